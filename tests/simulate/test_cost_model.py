"""What must hold on every machine, accelerator and recipe: monotone, bounded, in the right units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import UserError
from forerun.simulate.core.cost_model import CostModel, LearnerWork, nominal_cost_model
from forerun.simulate.core.decode import AnalyticalEngine, make_drafter
from forerun.simulate.core.hardware import cpu, load_hardware
from forerun.simulate.core.operators import Layout, Replica, check_layout
from forerun.simulate.core.shapes import load_model
from forerun.simulate.core.step import step_bound
from forerun.simulate.plan.planner import plan
from forerun.simulate.plan.spec import PlanSpec
from forerun.simulate.plan.step_model import StepModel

MODEL = load_model("Qwen3-0.6B")
DRAFTER = make_drafter("eagle3", MODEL)
SPEC = PlanSpec(
    model=MODEL.name, gpu="CPU", gpus=1, prompts=4, samples=4, mean_tokens=60, cap_tokens=200, slots=8, precision="fp32"
)
RATES = st.floats(1e10, 1e13)
BANDWIDTHS = st.floats(2e9, 1e12)
GAIN = st.floats(1.01, 5.0)
ACCEPTANCE = st.floats(0.05, 0.98)


def machine(flops: float, bandwidth: float) -> CostModel:
    return nominal_cost_model(cpu(flops, bandwidth, (), 64e9), MODEL, DRAFTER, "fp32")


def step_s(made: CostModel, k: int, acceptance: float) -> float:
    return float(StepModel(replace(SPEC, acceptance=acceptance), machine=made).split(k, 1, 0).step.step_s)


@settings(max_examples=40, deadline=None)
@given(RATES, BANDWIDTHS, GAIN, st.integers(0, 6), ACCEPTANCE)
def test_a_machine_with_more_flops_or_bandwidth_never_steps_slower(
    flops: float, bandwidth: float, by: float, k: int, acceptance: float
) -> None:
    base_s = step_s(machine(flops, bandwidth), k, acceptance)
    assert step_s(machine(by * flops, bandwidth), k, acceptance) < base_s  # the learner always computes
    assert step_s(machine(flops, by * bandwidth), k, acceptance) < base_s  # a pass always reads the weights


@settings(max_examples=40, deadline=None)
@given(RATES, BANDWIDTHS, st.integers(1, 6), ACCEPTANCE, ACCEPTANCE)
def test_more_acceptance_never_steps_slower_and_the_bound_holds(
    flops: float, bandwidth: float, k: int, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    made = machine(flops, bandwidth)
    assert step_s(made, k, high) <= step_s(made, k, low) * (1 + 1e-12)
    planner = StepModel(replace(SPEC, acceptance=high), machine=made)
    plain, fast = planner.split(0, 1, 0), planner.split(k, 1, 0)
    share = plain.stages.generation_s / plain.step.step_s
    speedup = plain.step.step_s / fast.step.step_s
    assert speedup <= step_bound(share, planner.alpha(k)) * (1 + 1e-9)
    assert speedup <= 1 / (1 - share) * (1 + 1e-9)  # Amdahl: as if rollouts were free


@settings(max_examples=40, deadline=None)
@given(RATES, BANDWIDTHS, st.integers(1, 64).map(float), st.integers(1, 4096).map(float))
def test_a_round_of_no_drafts_is_a_plain_step_and_rounds_grow_with_k(
    flops: float, bandwidth: float, batch: float, context: float
) -> None:
    engine = machine(flops, bandwidth).engine
    seconds = [float(engine.round_s(batch, k, context)) for k in range(9)]
    assert seconds[0] == float(engine.plain_s(batch, context))
    assert seconds == sorted(seconds)


def test_k_zero_is_the_plain_plan_on_a_machine_too() -> None:
    result = plan(replace(SPEC, k=0), machine=machine(1e11, 1e10))
    plain = {name: value for name, value in result.speculative.items() if name in result.plain}
    assert plain == result.plain and result.speculative["alpha"] == 1.0
    assert result.plain["step_s"] == pytest.approx(
        sum(result.plain[f"{s}_s"] for s in ("data", "prepare", "generation", "logprob", "train"))
    )


def test_a_machine_twice_as_fast_takes_half_of_all_that_is_not_fixed() -> None:
    slow, fast = machine(1e11, 1e10), machine(2e11, 2e10)
    fixed_s = 28 * 0.25e-3 + 2e-3  # launches of 28 layers, the loop
    assert slow.engine.step_s - fixed_s == pytest.approx(2 * (fast.engine.step_s - fixed_s))
    assert slow.engine.sequence_s == pytest.approx(2 * fast.engine.sequence_s)
    assert slow.score_token_s == pytest.approx(2 * fast.score_token_s)


def test_seconds_are_seconds() -> None:
    made = machine(1e11, 1e10)
    assert made.engine.step_s == pytest.approx(4 * 0.596e9 / (0.75 * 1e10) + 28 * 0.25e-3 + 2e-3, rel=0.02)  # read once
    assert made.engine.sequence_s == pytest.approx(2 * 0.596e9 / (0.8 * 1e11), rel=0.02)  # two FLOP per parameter
    assert made.train_token_s == pytest.approx(3 * made.score_token_s)
    gpu = load_hardware("H100")
    engine = AnalyticalEngine(Replica(load_model("Qwen3-8B"), gpu), make_drafter("eagle3", load_model("Qwen3-8B")))
    read_s = 2 * 7.6e9 / gpu.memory_bytes_per_s
    assert read_s < float(engine.plain_s(1.0, 100.0)) < 3 * read_s  # 6.9 ms measured


def test_the_learner_s_work_scales_with_tokens_passes_and_trained_share() -> None:
    made = machine(1e11, 1e10)
    base = made.stages(LearnerWork(1000.0), 2.0)
    twice = made.stages(LearnerWork(2000.0, score_passes=2.0, train_passes=4.0), 2.0)
    assert twice.logprob_s == pytest.approx(4 * base.logprob_s)
    assert twice.train_s - made.update_s == pytest.approx(8 / 3 * (base.train_s - made.update_s))
    assert made.stages(LearnerWork(1000.0, trained=0.0), 2.0).train_s == 0.0
    shared = made.stages(LearnerWork(1000.0), 2.0, machines=4.0)
    assert shared.train_s == pytest.approx(base.train_s / 4) and shared.generation_s == 2.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "Qwen3-235B-A22B"}, "Qwen3-235B-A22B needs 9.. GB of weights in fp32"),
        ({"precision": "fp8"}, "CPU does not multiply in 'fp8'"),
        ({"gpus": 0}, "gpus=0"),
        ({"lag": 1}, "machines cannot be split"),
        ({"mean_tokens": -4.0}, "mean -4"),
        ({"slots": 0}, "with 0 slots"),
    ],
)
def test_what_cannot_run_on_a_machine_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        plan(replace(SPEC, **change), machine=machine(1e11, 1e10))
    assert "\n" not in str(caught.value)


def test_a_parallel_layout_that_cannot_be_is_answered_with_one_that_can() -> None:
    shape = load_model("Qwen3-30B-A3B")
    with pytest.raises(UserError, match="128 experts, which cannot be spread over 6 groups; 4 works"):
        check_layout(Replica(shape, load_hardware("H200"), Layout(2, 3, 6)))
    with pytest.raises(UserError, match="over 8 of 4 GPUs; 4 works"):
        check_layout(Replica(shape, load_hardware("H200"), Layout(4, 1, 8)))
    with pytest.raises(UserError, match="fp16"):
        nominal_cost_model(load_hardware("H100"), MODEL, DRAFTER, "fp16")
