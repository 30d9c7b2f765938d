"""Properties of the operators and rounds: monotone where they must be, exact where a limit is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import UserError
from forerun.simulate.core.decode import (
    Acceptance,
    AnalyticalEngine,
    RoundConstants,
    acceptance_from_lengths,
    acceptance_length,
    best_k_by_batch,
    constant_acceptance,
    make_drafter,
    rate_for,
)
from forerun.simulate.core.hardware import load_hardware
from forerun.simulate.core.operators import (
    Layout,
    Replica,
    cache_tokens,
    check_layout,
    collective_s,
    distinct_experts,
    forward_s,
    gemm_s,
    prefill_s,
)
from forerun.simulate.core.shapes import load_model

MODELS = st.sampled_from(["Qwen3-0.6B", "Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "DeepSeek-V3"])
GPUS = st.sampled_from(["A100", "H100", "H200", "B200", "GB200"])
BATCH = st.integers(1, 1024).map(float)
CONTEXT = st.integers(1, 32768).map(float)
METHODS = st.sampled_from(["eagle3", "eagle1", "mtp", "ngram", "tree"])


def build(model: str, gpu: str, tensor: int = 8) -> Replica:
    shape = load_model(model)
    return Replica(shape, load_hardware(gpu), Layout(tensor, 1, tensor if shape.experts else 1))


@settings(max_examples=60, deadline=None)
@given(MODELS, GPUS, BATCH, CONTEXT, st.floats(1.01, 4.0))
def test_more_bandwidth_flops_or_link_never_slows(
    model: str, gpu: str, batch: float, context: float, by: float
) -> None:
    replica = build(model, gpu)
    hardware = replica.gpu
    base_s = forward_s(replica, batch, 4.0, context)
    for faster in (
        replace(hardware, memory_bytes_per_s=by * hardware.memory_bytes_per_s),
        replace(hardware, flops={name: by * rate for name, rate in hardware.flops.items()}),
        replace(hardware, link_bytes_per_s=by * hardware.link_bytes_per_s),
    ):
        assert forward_s(replace(replica, gpu=faster), batch, 4.0, context) <= base_s * (1 + 1e-12)
        assert prefill_s(replace(replica, gpu=faster), context) <= prefill_s(replica, context) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(MODELS, GPUS, METHODS, BATCH, CONTEXT)
def test_rounds_start_at_a_plain_step_and_grow_with_k(
    model: str, gpu: str, method: str, batch: float, context: float
) -> None:
    replica = build(model, gpu)
    engine = AnalyticalEngine(replica, make_drafter(method, replica.model), RoundConstants(1e-4, 1e-4, 1e-6, 1e-6))
    seconds = [float(engine.round_s(batch, k, context)) for k in range(9)]
    assert seconds[0] == float(engine.plain_s(batch, context))
    assert all(after >= before for before, after in pairwise(seconds))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 16), st.floats(0, 1), st.floats(0, 1))
def test_acceptance_length_is_one_plus_accepted_and_monotone(k: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    accepted = sum(low**j for j in range(1, k + 1))
    assert float(acceptance_length(k, low)) == pytest.approx(1 + accepted, rel=1e-6)
    assert float(constant_acceptance(low).length(k)) == pytest.approx(1 + accepted, rel=1e-6)
    assert acceptance_length(k, low) <= acceptance_length(k, high) + 1e-9
    assert 1 - 1e-9 <= float(acceptance_length(k, low)) <= k + 1 + 1e-9


def test_cumulative_rates_of_a_published_run_sum_to_its_length() -> None:
    cumulative = [0.886, 0.770, 0.663]  # SkyRL, MTP with k = 3: 3.32 tokens a round
    rates = [cumulative[0], cumulative[1] / cumulative[0], cumulative[2] / cumulative[1]]
    assert float(Acceptance(tuple(rates)).length(3)) == pytest.approx(3.32, abs=0.005)


def test_measured_lengths_are_met_and_interpolated() -> None:
    measured = {3: 3.32, 5: 4.35, 7: 5.06}
    curve = acceptance_from_lengths(measured)
    assert np.allclose(curve.length(np.array([3, 5, 7])), [3.32, 4.35, 5.06], atol=1e-6)
    assert 3.32 < float(curve.length(4)) < 4.35
    assert rate_for(3, 4.0) == pytest.approx(1.0)
    with pytest.raises(UserError, match="between 1 and 4"):
        rate_for(3, 4.5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-9, 0.3, 0.5, 0.7, 1.0 - 1e-9, 1.0]) | st.floats(0, 1), min_size=1, max_size=8))
def test_any_curve_that_does_not_rise_is_met(rates: list[float]) -> None:
    """Cumulative rates with plateaus, ones and zeros, and one that rises a little, as measured ones do."""
    cumulative = sorted(rates, reverse=True)
    lengths = {k: 1.0 + sum(cumulative[:k]) for k in range(1, len(cumulative) + 1)}
    curve = acceptance_from_lengths(lengths)
    assert np.allclose(curve.length(np.array(list(lengths))), list(lengths.values()), atol=1e-5)
    assert all(0.0 <= rate <= 1.0 for rate in curve.rates)
    next_length = 1.0 + sum(cumulative) + cumulative[-1] + 0.02
    risen = acceptance_from_lengths({**lengths, len(lengths) + 1: min(next_length, len(lengths) + 2.0)})
    assert all(0.0 <= rate <= 1.0 for rate in risen.rates)


def test_perfect_and_equal_rates_are_rates() -> None:
    assert acceptance_from_lengths({1: 2.0, 2: 3.0, 3: 4.0}).rates == (1.0, 1.0, 1.0)
    assert acceptance_from_lengths({1: 1.0, 3: 1.0}).rates == (0.0, 0.0, 0.0)
    assert np.allclose(acceptance_from_lengths({1: 1.5, 2: 2.0, 3: 2.5}).rates, (0.5, 1.0, 1.0))
    assert np.allclose(acceptance_from_lengths({1: 1.5, 2: 2.04}).rates, (0.5, 1.0))
    for lengths, words in (({1: 1.1, 2: 2.9}, "between 1 and 1.2, as it is 1.1 with k = 1"), ({3: 4.5}, "1 and 4:")):
        with pytest.raises(UserError, match=words):
            acceptance_from_lengths(lengths)


def test_distinct_experts_match_a_simulation() -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.permuted(np.tile(np.arange(128), (8, 1)), axis=1)[:, :8] for _ in range(1000)]
    drawn = np.mean([len(np.unique(choice)) for choice in tokens])
    assert float(distinct_experts(128, 8, 8.0)) == pytest.approx(drawn, rel=0.01)
    for k, factor in ((1, 1.60), (3, 2.17), (5, 2.37), (7, 2.44)):  # batch 8, published factors
        assert distinct_experts(128, 8, 8.0 * (k + 1)) / distinct_experts(128, 8, 8.0) == pytest.approx(
            factor, abs=0.006
        )


def test_gemm_meets_its_roofline() -> None:
    replica = build("Qwen3-8B", "H100", 1)
    fit, gpu = replica.gpu.gemm["bf16"], replica.gpu
    tall = 2 * 1e5 * 4096 * 4096 / (fit.compute_share * gpu.flops["bf16"]) + fit.overhead_s
    assert float(gemm_s(replica, 1e5, 4096, 4096)) == pytest.approx(tall)
    thin = (2 * (4096 + 4096 * 4096) + 2 * 4096) / (fit.bandwidth_share * gpu.memory_bytes_per_s) + fit.overhead_s
    assert float(gemm_s(replica, 1.0, 4096, 4096)) == pytest.approx(thin)
    assert float(collective_s(replica, 1, np.float64(1e6), 2.0)) == 0.0


def test_impossible_layouts_are_answered_with_what_works() -> None:
    gpu = load_hardware("H100")
    with pytest.raises(UserError, match="use 8 GPUs"):
        check_layout(Replica(load_model("Qwen3-235B-A22B"), gpu, Layout(1, 1, 1)))
    with pytest.raises(UserError, match="32 heads, which 3 GPUs cannot share; 2 can"):
        check_layout(Replica(load_model("Qwen3-8B"), gpu, Layout(3)))
    with pytest.raises(UserError, match="0 experts"):
        check_layout(Replica(load_model("Qwen3-8B"), gpu, Layout(4, 1, 4)))
    with pytest.raises(UserError, match="must be 1 at least"):
        check_layout(Replica(load_model("Qwen3-8B"), gpu, Layout(0)))
    assert cache_tokens(build("Qwen3-8B", "H100", 1)) == pytest.approx(377_024, rel=0.1)  # what vLLM reported there


def test_fewer_drafts_are_best_at_larger_batches() -> None:
    engine = AnalyticalEngine(build("Qwen3-8B", "H100", 1), make_drafter("eagle3", load_model("Qwen3-8B")))
    chosen = best_k_by_batch(engine, constant_acceptance(0.7), 2000.0, [1, 8, 64, 512], 8)
    sizes, ks = zip(*chosen, strict=True)
    assert list(sizes) == sorted(sizes) and sizes[-1] == np.inf
    assert ks[0] >= ks[-1]
    assert all(before != after for before, after in pairwise(ks))  # equal neighbours are one
    assert best_k_by_batch(engine, constant_acceptance(0.0), 2000.0, [1, 8], 8) == [(np.inf, 0)]
    with pytest.raises(UserError, match="no cost model for the drafter 'medusa'"):
        make_drafter("medusa", load_model("Qwen3-8B"))
