"""Runs as witnesses: constants recovered from made-up runs, a recorded run predicted on the steps that were not fitted,
and a tiny real one planned end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from forerun.errors import UserError
from forerun.simulate.core.cost_model import CostModel, LearnerWork
from forerun.simulate.core.hardware import nominal_cpu
from forerun.simulate.core.shapes import load_model
from forerun.simulate.plan.calibrate import (
    StepRecord,
    benchmarked_cost_model,
    calibrate,
    decode_work,
    plain_decode_work,
    predict_step,
    summary,
)
from forerun.simulate.plan.cost_table import read_cost_table
from forerun.simulate.plan.recipe import read_recipe
from forerun.simulate.plan.render import run_text
from forerun.simulate.plan.run import calibrate_run, plan_run, read_run, records
from forerun.simulate.plan.step_model import StepModel

RECORDED = Path(__file__).parent / "recorded_run"
WORK = LearnerWork(tokens=0.0, score_passes=1.0, train_passes=3.0, updates=1)


def recorded_recipe() -> dict[str, Any]:
    return yaml.safe_load((RECORDED / "config.resolved.yaml").read_text())


def nominal() -> CostModel:
    machine = read_recipe(recorded_recipe(), {}, here=nominal_cpu(2, ("avx2",), 16.0)).machine
    assert machine is not None
    return machine


def true_machine(k: int) -> CostModel:
    """Not the nominal one: every constant is off by another factor."""
    start = nominal()
    engine = replace(
        start.engine,
        step_s=1.6 * start.engine.step_s,
        sequence_s=0.6 * start.engine.sequence_s,
        prompt_token_s=0.6 * start.engine.sequence_s,
        row_s=1.7 * start.engine.row_s,
        draft_row_s=1.7 * start.engine.draft_row_s,
        verify_fixed_s=2.0 * start.engine.verify_fixed_s if k else start.engine.verify_fixed_s,
        draft_fixed_s=2.0 * start.engine.draft_fixed_s if k else start.engine.draft_fixed_s,
    )
    return replace(
        start, engine=engine, score_token_s=1.3 * start.score_token_s, train_token_s=0.8 * start.train_token_s,
        update_s=1.4 * start.update_s, prepare_s=0.5, data_s=0.01, reward_s=0.02, drafter_s=0.3,
    )  # fmt: skip


def made_up_steps(truth: CostModel, k: int, count: int = 24, noise: float = 0.0) -> list[StepRecord]:
    """Steps whose batch, lengths and share of trained groups vary, timed by a known machine."""
    rng, steps = np.random.default_rng(1), []
    for number in range(1, count + 1):
        rollouts = int(rng.choice([4, 8, 16, 24]))
        tokens = np.clip(np.rint(rng.lognormal(4.2, 0.5, rollouts)), 4, 160)
        rounds = np.ceil(tokens / 3.0) if k else tokens
        blank = StepRecord(
            number, {}, 0.02, 0.3, tokens, rounds, float(rng.integers(0, 2) * tokens.sum()), 40.0, rollouts // 4, k > 0,
            1.0, float(tokens.sum()),
        )  # fmt: skip
        seconds = predict_step(blank, truth, k, 8, WORK)
        plain = predict_step(replace(blank, rounds=tokens, drafted=False), truth, 0, 8, WORK)["generation"]
        seconds["generation"] -= truth.reward_s
        seconds["train"] -= truth.drafter_s
        seconds = {name: value * float(np.exp(noise * rng.standard_normal())) for name, value in seconds.items()}
        steps.append(replace(blank, seconds=seconds, compare_s=plain - truth.reward_s))
    return steps


@pytest.mark.parametrize("k", [0, 4])
def test_the_constants_of_a_made_up_machine_are_found(k: int) -> None:
    truth = true_machine(k)
    fit = calibrate(made_up_steps(truth, k), nominal(), k, 8, WORK)
    found = fit.machine
    assert found.engine.step_s == pytest.approx(truth.engine.step_s, rel=0.05)
    assert found.engine.sequence_s == pytest.approx(truth.engine.sequence_s, rel=0.2)  # the nominal pulls
    assert found.score_token_s == pytest.approx(truth.score_token_s, rel=1e-6)
    assert found.train_token_s == pytest.approx(truth.train_token_s, rel=0.05)
    assert (found.prepare_s, found.data_s, found.reward_s, found.drafter_s) == pytest.approx((0.5, 0.01, 0.02, 0.3))
    if k:
        assert found.engine.row_s == pytest.approx(truth.engine.row_s, rel=0.1)
    assert fit.errors["step"]["worst"] < 0.03
    assert fit.fitted_steps == tuple(range(1, 25, 2)) and fit.tested_steps == tuple(range(2, 25, 2))


def test_the_fit_never_sees_the_tested_steps() -> None:
    steps = made_up_steps(true_machine(4), 4, noise=0.05)
    spoilt = [
        s if s.step % 2 else replace(s, seconds={n: 9 * v for n, v in s.seconds.items()}, compare_s=99.0) for s in steps
    ]
    honest, misled = calibrate(steps, nominal(), 4, 8, WORK), calibrate(spoilt, nominal(), 4, 8, WORK)
    assert honest.constants_s == misled.constants_s
    assert honest.errors["step"]["worst"] < 0.3 < misled.errors["step"]["median"]


def test_bands_are_the_errors_on_tested_steps() -> None:
    quiet, loud = (calibrate(made_up_steps(true_machine(4), 4, noise=n), nominal(), 4, 8, WORK) for n in (0.0, 0.2))
    assert quiet.machine.engine_band < 0.05 < 0.15 < loud.machine.engine_band
    assert loud.machine.engine_band == loud.errors["generation"]["worst"]
    assert "on the 12 others the step was off by" in loud.machine.origin


def test_what_a_run_cannot_tell_stays_nominal_and_is_named() -> None:
    steps = [replace(s, compare_s=None, trained_tokens=0.0, drafter_s=0.0) for s in made_up_steps(true_machine(4), 4)]
    fit = calibrate(steps, nominal(), 4, 8, WORK)
    assert "no fitted step had a gradient" in " ".join(fit.not_identified)
    assert fit.machine.train_token_s == nominal().train_token_s
    assert "train" in fit.errors and fit.errors["train"] == {"steps": 0.0} and fit.plain_error == {}


def test_too_few_steps_and_lopsided_ones_are_one_sentence() -> None:
    steps = made_up_steps(true_machine(0), 0)
    with pytest.raises(UserError, match=r"has 3 finished steps; .* needs 4 at least"):
        calibrate(steps[:3], nominal(), 0, 8, WORK)
    with pytest.raises(UserError, match="All 12 steps of the run are odd"):
        calibrate(steps[::2], nominal(), 0, 8, WORK)


def test_a_recorded_run_is_predicted_on_its_even_steps() -> None:
    """SmolLM2-135M, 8 steps of 8 rollouts, k = 4, one thread of a 2-core AMD EPYC that did other things as well."""
    fit = calibrate_run(RECORDED, recorded_recipe())
    assert fit.k == 4 and fit.tested_steps == (2, 4, 6, 8)
    assert fit.errors["generation"]["worst"] < 0.10
    assert fit.plain_error["worst"] < 0.10
    assert fit.errors["train"]["steps"] == 3  # one tested step had no gradient
    for stage in ("prepare", "logprob", "train", "step"):
        assert fit.errors[stage]["median"] < 0.12, stage
        assert fit.errors[stage]["worst"] < 0.25, stage


def test_a_recorded_bench_predicts_the_recorded_run() -> None:
    """Two measurements of one machine: the cost table knows nothing of the run but its lengths and rounds."""
    table, recipe = read_cost_table(RECORDED.parent / "recorded_bench.json"), recorded_recipe()
    engine = benchmarked_cost_model(nominal(), table, "eagle3").engine
    steps, slots = records(read_run(RECORDED), recipe), recipe["rollout"]["slots"]
    drafted = [
        (engine.generation_s(decode_work(s.rounds, s.tokens, s, slots), 4), s.seconds["generation"]) for s in steps
    ]
    plain = [(engine.generation_s(plain_decode_work(s, slots), 0), float(s.compare_s or 0.0)) for s in steps]
    for pairs in (drafted, plain):
        assert abs(summary(pairs)["total"]) < 0.06
        assert summary(pairs)["worst"] < 0.12


def test_nominal_figures_are_within_their_band_of_two_machines() -> None:
    """The recorded run's machine, and one with bfloat16 units: 48 answers of 96 tokens, k = 4, 14.0 s, plain 24.8 s."""
    steps, slots = records(read_run(RECORDED), recorded_recipe()), 8
    for s in steps:
        ours_s = nominal().engine.generation_s(decode_work(s.rounds, s.tokens, s, slots), 4)
        assert 0.5 < ours_s / s.seconds["generation"] < 2.0
    recipe = recorded_recipe()
    recipe["train"] |= {"prompts_per_step": 6, "samples_per_prompt": 8}
    lengths = {1: 1.77, 2: 2.41, 3: 2.94, 4: 3.37}
    changes = {"trace": [96.0] * 48, "acceptance_lengths": lengths}
    found = read_recipe(recipe, changes, here=nominal_cpu(2, ("avx512_bf16",), 16.0))
    planner = StepModel(found.spec, machine=found.machine, model=found.model)
    assert found.spec.precision == "bf16"
    for k, measured_s in ((0, 24.8), (4, 14.0)):
        assert 0.5 < planner.generation_s(k, 1, 0) / measured_s < 2.0
    speedup = planner.generation_s(0, 1, 0) / planner.generation_s(4, 1, 0)
    assert speedup / 1.4 < 24.8 / 14.0 < speedup * 1.4


def test_a_recorded_run_answers_how_it_would_go_otherwise() -> None:
    answer = plan_run(RECORDED, recorded_recipe())
    json.dumps(answer, allow_nan=False)
    rows = {row["change"]: row for row in answer["what_if"]}
    assert rows["k = 4"]["against_now"] == pytest.approx(1.0)
    assert rows["k = 0"]["against_now"] < 0.95  # plain was measured 1.5 times as slow in generation
    steps = records(read_run(RECORDED), recorded_recipe())
    measured = sum(s.compare_s or 0.0 for s in steps) / sum(s.seconds["generation"] for s in steps)
    assert rows["k = 0"]["generation_s"] / rows["k = 4"]["generation_s"] == pytest.approx(measured, rel=0.15)
    assert rows["lag 1, generation on a second machine like this"]["step_s"] < rows["k = 4"]["step_s"]
    assert rows["twice the prompts"]["tokens_per_s"] > rows["half the prompts"]["tokens_per_s"]
    assert all(row["low"] <= row["against_now"] <= row["high"] for row in rows.values())
    assert answer["plan"]["speculative"]["k"] == 4 and answer["plan"]["bands"]["generation"] < 0.1
    said = run_text(answer)
    assert "fitted on the odd steps" in said and "tested steps" in said and "how it would go with" in said


def test_a_run_with_a_drafter_from_outside_is_calibrated_on_its_own_steps() -> None:
    recipe = recorded_recipe()
    known = plan_run(RECORDED, recipe)
    recipe["speculation"] |= {"method": "my_package:Drafter", "draft": None}
    strange = plan_run(RECORDED, recipe)
    assert strange["plan"]["spec"]["method"] == "my_package:Drafter"
    assert strange["calibration"]["errors"]["generation"]["worst"] < 0.2
    ours, theirs = (answer["plan"]["speedup"]["generation"] for answer in (strange, known))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_a_run_is_planned_with_changes_but_not_on_other_hardware() -> None:
    answer = plan_run(RECORDED, recorded_recipe(), {"k": 2, "slots": 4})
    assert (answer["plan"]["speculative"]["k"], answer["plan"]["spec"]["slots"]) == (2, 4)
    with pytest.raises(UserError, match="hardware=H100 is not what the run ran on"):
        plan_run(RECORDED, recorded_recipe(), {"hardware": "H100"})
    with pytest.raises(UserError, match="no key 'slot'; the nearest is 'slots'"):
        plan_run(RECORDED, recorded_recipe(), {"slot": 4})


def copy_run(folder: Path, keep: Callable[[dict[str, Any]], dict[str, Any] | None], name: str) -> Path:
    """The recorded run with the lines of one file changed."""
    for file in RECORDED.iterdir():
        lines = file.read_text().splitlines() if file.name == name else []
        changed = [keep(json.loads(line)) for line in lines]
        text = "\n".join(json.dumps(line) for line in changed if line is not None) if lines else file.read_text()
        (folder / file.name).write_text(text + "\n")
    return folder


def test_rollouts_that_were_not_kept_are_made_up_to_the_step_s_own_figures(tmp_path: Path) -> None:
    whole = calibrate_run(RECORDED, recorded_recipe())
    first = copy_run(tmp_path, lambda line: line if line["prompt_id"].endswith("/0") else None, "rollouts.jsonl")
    half = calibrate_run(first, recorded_recipe())
    assert half.errors["generation"]["worst"] < 0.2
    assert half.constants_s["plain pass"] == pytest.approx(whole.constants_s["plain pass"], rel=0.3)
    (tmp_path / "rollouts.jsonl").unlink()
    assert calibrate_run(first, recorded_recipe()).errors["generation"]["worst"] < 0.25


def test_a_drafter_that_learns_beside_is_told_apart_from_the_policy_s_training(tmp_path: Path) -> None:
    def learning(line: dict[str, Any]) -> dict[str, Any]:
        return line | {"time/train": line["time/train"] + 3.0, "time/draft_train": 3.0}

    alone = calibrate_run(RECORDED, recorded_recipe())
    beside = calibrate_run(copy_run(tmp_path, learning, "metrics.jsonl"), recorded_recipe())
    assert beside.machine.drafter_s == 3.0 and alone.machine.drafter_s == 0.0
    assert beside.machine.train_token_s == pytest.approx(alone.machine.train_token_s)
    assert beside.errors["train"]["steps"] == 4  # the drafter learns from steps without a gradient too


def test_runs_that_cannot_be_calibrated_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/reward": 0.3}\n{"torn')
    with pytest.raises(UserError, match="has not finished a step"):
        read_run(tmp_path)

    def without(line: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in line.items() if name != "perf/gen_tokens"}

    copy_run(tmp_path, without, "metrics.jsonl")
    with pytest.raises(UserError, match="Step 1 of the run lacks perf/gen_tokens"):
        calibrate_run(tmp_path, recorded_recipe())
    served = recorded_recipe()
    served["rollout"]["engine"] = "vllm"
    (tmp_path / "env.json").write_text(json.dumps({"devices": ["NVIDIA H100 80GB HBM3"]}))
    with pytest.raises(UserError, match="only runs of the local engine"):
        calibrate_run(tmp_path, served)


def test_a_plain_run_says_that_its_speculation_is_nominal(tmp_path: Path) -> None:
    def plain(line: dict[str, Any]) -> dict[str, Any]:
        line |= {"time/generation": line["compare/plain_s"], "perf/gen_tokens": line["compare/plain_tokens"]}
        line["length/mean"] = line["perf/gen_tokens"] / 8
        return {n: v for n, v in line.items() if not n.startswith(("spec/", "compare/"))}

    copy_run(tmp_path, plain, "metrics.jsonl")
    (tmp_path / "rollouts.jsonl").unlink()
    recipe = recorded_recipe()
    recipe["speculation"] |= {"method": "none"}
    answer = plan_run(tmp_path, recipe)
    assert answer["calibration"]["errors"]["generation"]["worst"] < 0.25
    assert "The run did not draft" in " ".join(answer["plan"]["notes"])
    assert answer["plan"]["speedup"]["error_of_c"] == pytest.approx(0.4)


def test_a_tiny_real_run_is_planned_by_the_command(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import forerun

    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    recipe = {
        "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl")},
        "rollout": {"slots": 4, "max_new_tokens": 8},
        "train": {"steps": 4, "prompts_per_step": 2, "samples_per_prompt": 4},
        "eval": {"prompts": 0},
        "checkpoint": {"every": 0},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    run = forerun.train(str(tmp_path / "tiny.yaml"))["run"]
    command = [sys.executable, "-m", "forerun.cli", "plan", run, "--json", "--html", str(tmp_path / "plan.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["calibration"]["tested_steps"] == [2, 4]
    assert said["plan"]["spec"]["samples"] == 4 and said["now"]["tokens_per_s"] > 0
    assert "<h2>Calibration</h2>" in (tmp_path / "plan.html").read_text()
    assert load_model(Path(run) / "hf" / "policy").layers == 4
