"""Draining batches and RL steps: the fast path against the event loop, limits, bounds, bad input."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import UserError
from forerun.simulate.core.decode import (
    AnalyticalEngine,
    LinearEngine,
    RoundConstants,
    acceptance_length,
    make_drafter,
)
from forerun.simulate.core.hardware import load_hardware
from forerun.simulate.core.operators import Layout, Replica
from forerun.simulate.core.rollout import (
    Floats,
    drain_by_events,
    drain_together,
    sample_lengths,
    simulate_rollout,
    trace_lengths,
)
from forerun.simulate.core.shapes import load_model
from forerun.simulate.core.step import (
    Learner,
    Stages,
    async_step,
    best_split,
    forward_flops,
    learner_stages,
    refit_s,
    step_bound,
)

MODEL = load_model("Qwen3-8B")
ENGINE = AnalyticalEngine(Replica(MODEL, load_hardware("H100")), make_drafter("eagle3", MODEL), RoundConstants())
CONSTANT = LinearEngine(0.01, 0.0, 0.0, 0.0, 0.0, 0.005, 0.0)  # 10 ms a step, 5 ms a draft token, nothing else


def test_the_fast_drain_equals_the_event_loop() -> None:
    queue = sample_lengths(800, 1.0, 4096, 60, seed=3).reshape(4, 15)
    queue[2, 10:] = 0.0

    def pace(batch: Floats, context: Floats) -> Floats:  # k changes with the batch
        k = np.where(batch <= 4.0, 5, 2)
        alpha = np.where(batch <= 4.0, acceptance_length(5, 0.7), acceptance_length(2, 0.7))
        return np.asarray(ENGINE.round_s(batch, k, context)) / alpha

    fast = drain_together(pace, queue.copy(), 100.0, 1e-3)
    slow = drain_by_events(pace, queue.copy(), 15, 100.0, 1e-3)
    for name in ("seconds", "prefill_s"):
        assert np.allclose(getattr(fast, name), getattr(slow, name), rtol=1e-9), name
    assert np.allclose(fast.batch_seconds, slow.batch_seconds, rtol=0.02)  # prefill is booked at another batch


def test_a_constant_engine_gives_closed_forms() -> None:
    lengths = np.array([100.0, 300.0, 200.0, 50.0])
    plain = simulate_rollout(CONSTANT, lengths, replicas=1, slots=4)
    assert plain.seconds == pytest.approx(300 * 0.01)
    fast = simulate_rollout(CONSTANT, lengths, replicas=1, k=2, alpha=3.0, slots=4)
    assert fast.seconds == pytest.approx(100 * 0.02)
    one = simulate_rollout(CONSTANT, lengths, replicas=1, slots=1)
    assert one.seconds == pytest.approx(650 * 0.01)
    two = simulate_rollout(CONSTANT, lengths, replicas=1, slots=2)
    assert two.seconds == pytest.approx(350 * 0.01)  # 100, then 200 and 50 behind it, beside 300


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 0.99), st.floats(0.0, 0.99), st.integers(1, 8))
def test_a_rollout_is_monotone_in_acceptance(low: float, high: float, k: int) -> None:
    low, high = sorted((low, high))
    lengths = sample_lengths(400, 0.8, 2048, 32)
    seconds = [
        simulate_rollout(ENGINE, lengths, replicas=2, k=k, alpha=acceptance_length(k, rate)).seconds
        for rate in (low, high)
    ]
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


def test_more_replicas_never_slow_and_a_large_step_is_quick() -> None:
    lengths = sample_lengths(5000, 0.8, 8192, 4096)
    model = load_model("Qwen3-235B-A22B")
    replica = Replica(model, load_hardware("GB200"), Layout(8, 1, 8), "fp8", 1.0)
    engine = AnalyticalEngine(replica, make_drafter("eagle3", model))
    start_s = time.perf_counter()
    seconds = [
        simulate_rollout(engine, lengths, replicas=replicas, k=3, alpha=acceptance_length(3, 0.8)).seconds
        for replicas in (64, 128, 256)
    ]
    assert time.perf_counter() - start_s < 6.0  # three steps of up to 2,048 GPUs; one takes well below 2 s
    assert seconds == sorted(seconds, reverse=True)


def test_overlapping_batches_beat_a_drain_but_not_the_work() -> None:
    lengths = sample_lengths(1000, 0.8, 8192, 512)
    drain = simulate_rollout(ENGINE, lengths, replicas=8).seconds
    stream = [simulate_rollout(ENGINE, lengths, replicas=8, in_flight=n).seconds for n in (2, 3, 4)]
    assert drain > stream[0] >= stream[1] >= stream[2] > 0


STAGES = st.builds(Stages, *(st.floats(0.01, 500.0) for _ in range(5)))


@settings(max_examples=100, deadline=None)
@given(STAGES, st.integers(1, 4))
def test_async_steps(stages: Stages, lag: int) -> None:
    total_s = stages.data_s + stages.prepare_s + stages.generation_s + stages.logprob_s + stages.train_s
    assert async_step(stages, 0).step_s == pytest.approx(total_s)
    step = async_step(stages, lag)
    assert max(stages.generation_s, stages.learner_s) <= step.step_s <= total_s + 1e-9
    assert step.exposed_s == pytest.approx(step.step_s - stages.learner_s)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.floats(0.05, 0.99), st.floats(1.0, 2000.0), st.integers(1, 256))
def test_the_bound_of_the_paper_is_never_exceeded(k: int, rate: float, other_s: float, requests: int) -> None:
    lengths, alpha = sample_lengths(500, 0.7, 4096, requests), acceptance_length(k, rate)
    plain_s, fast_s = (
        simulate_rollout(ENGINE, lengths, replicas=2, k=drafts, alpha=emitted).seconds
        for drafts, emitted in ((0, 1.0), (k, alpha))
    )
    share = plain_s / (plain_s + other_s)
    speedup = (plain_s + other_s) / (fast_s + other_s)
    assert speedup <= step_bound(share, alpha) * (1 + 1e-9)


def test_learner_scales_with_gpus_and_tokens() -> None:
    gpu, learner = load_hardware("H100"), Learner(prepare_fixed_s=1.0)
    few, many = (learner_stages(learner, MODEL, gpu, gpus, 512, 4096, 10.0) for gpus in (8, 16))
    assert few.train_s == pytest.approx(2 * many.train_s)
    assert few.train_s == pytest.approx(1.5 * few.logprob_s)  # three forwards against two
    assert forward_flops(MODEL, 1, 1) == pytest.approx(2 * (6.95e9 + 151936 * 4096), rel=0.01)
    assert refit_s(load_model("Qwen3-235B-A22B")) == pytest.approx(4.7, rel=0.05)  # 4.56-4.85 s published


def test_the_best_split_balances_both_sides() -> None:
    def stages_of(generating: int, training: int) -> Stages:
        return Stages(0.0, 0.0, 800 / generating, 0.0, 2400 / training)

    split = best_split(64, 4, 1, stages_of)
    assert split.generation_gpus == 16
    with pytest.raises(UserError, match="cannot be split"):
        best_split(4, 4, 1, stages_of)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UserError, match="mean -5"):
        sample_lengths(-5, 0.5, 100, 3)
    with pytest.raises(UserError, match="smallest is -3"):
        trace_lengths([10, -3])
    with pytest.raises(UserError, match="0 replicas"):
        simulate_rollout(ENGINE, np.ones(3), replicas=0)
    with pytest.raises(UserError, match="0 is synchronous"):
        async_step(Stages(1, 1, 1, 1, 1), -1)
