"""Recipes planned and predicted: what is read from them, what is assumed and said, and how a prediction is judged."""

from __future__ import annotations

import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from cost_tables import bench_rows, write_table
from forerun.config import load_recipe
from forerun.errors import UserError
from forerun.simulate.core.decode import LinearEngine
from forerun.simulate.core.hardware import cpu
from forerun.simulate.core.step import Stages
from forerun.simulate.plan.cost_table import read_cost_table
from forerun.simulate.plan.predict import compare, predict_recipe
from forerun.simulate.plan.recipe import combined_band, plan_recipe, read_recipe
from forerun.simulate.plan.render import comparison_text, prediction_text
from forerun.simulate.plan.step_model import StepModel
from forerun.types import STAGES

HERE = cpu(100e9, 12e9, ("avx2",), 16e9)


def recipe(name: str = "quickstart", **changes: Any) -> dict[str, Any]:
    """A shipped recipe as plain data; keys of `changes` name a group and a field, as in `train__kl`."""
    data = deepcopy(load_recipe(name).model_dump())
    for key, value in changes.items():
        group, field = key.split("__")
        data[group][field] = value
    return data


def test_a_recipe_says_its_model_batch_lengths_and_speculation() -> None:
    found = read_recipe(recipe(speculation__k=4, rollout__slots=8), {}, here=HERE)
    spec, data = found.spec, recipe()
    assert (found.model.layers, found.model.vocab) == (30, 49152)
    assert (spec.prompts, spec.samples) == (data["train"]["prompts_per_step"], data["train"]["samples_per_prompt"])
    assert (spec.k, spec.method, spec.slots, spec.lag) == (4, "eagle3", 8, 0)
    assert spec.cap_tokens == data["rollout"]["max_new_tokens"]
    assert len(spec.trace) == spec.prompts * spec.samples and max(spec.trace) <= spec.cap_tokens
    assert spec.precision == "fp32"  # this CPU emulates bfloat16
    assert found.machine is not None and found.drafts


def test_the_drafter_s_own_config_tells_lengths_acceptance_and_vocabulary(tmp_path: Path) -> None:
    made = {"tokens": 900, "rollouts": 10, "acceptance_per_position": [0.8, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps({"draft_vocab_size": 77, "forerun": made}))
    found = read_recipe(recipe(speculation__draft=str(tmp_path)), {}, here=HERE)
    assert sum(found.spec.trace) / len(found.spec.trace) == pytest.approx(90, rel=0.02)
    assert found.spec.acceptance_lengths == pytest.approx({1: 1.8, 2: 2.2})
    assert found.spec.draft_vocab == 77
    assert (found.length_band, found.acceptance_band) == (0.25, 0.15)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_recipe(recipe(speculation__draft=str(tmp_path)), {}, here=HERE)


def test_what_is_unknown_is_assumed_said_and_widens_the_band() -> None:
    found = read_recipe(recipe("gsm8k"), {}, here=HERE)
    said = " ".join(found.assumed)
    assert "half of max_new_tokens: an assumption" in said and "0.75 per position: an assumption" in said
    assert found.length_band == 1.0 and found.acceptance_band == 0.35
    told = read_recipe(recipe("gsm8k"), {"mean_tokens": 200.0, "acceptance": 0.8}, here=HERE)
    assert (told.length_band, told.acceptance_band) == (0.0, 0.0)
    assert "assumption" not in " ".join(told.assumed)
    assert combined_band(1.0, 0.35) > 1.0 > combined_band(0.2, 0.1) > 0.2 == pytest.approx(combined_band(0.2, 0.0))


def test_a_recipe_is_planned_on_other_hardware() -> None:
    changes = {"hardware": "H200", "gpus": 8, "lag": 1, "acceptance": 0.8, "prompts": 32}
    result = plan_recipe(recipe("gsm8k", policy__model="Qwen3-8B"), changes)
    assert (result.spec["gpu"], result.spec["gpus"], result.spec["lag"]) == ("H200", 8, 1)
    assert result.split["generation_gpus"] + result.split["training_gpus"] == 8
    assert result.spec["engine"] == "vllm" and "planned is rollout.engine=vllm" in " ".join(result.notes)
    assert result.bands == {} and "MFU" in " ".join(result.notes)


def test_a_recipe_on_this_machine_is_planned_whole() -> None:
    result = plan_recipe(recipe(), {"hardware": "cpu"})
    assert result.spec["gpu"] == "CPU" and result.bands == {"generation": 1.0, "learner": 1.0}
    assert result.drafter["params"] > 1e6 and 0 < result.drafter["share_of_round"] < 1
    assert {row["gpus"] for row in result.sweep} == {1, 2, 4}
    assert "Nothing was measured on this machine" in result.text()
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_recipe_without_speculation_is_planned_with_the_best_drafter_and_predicted_without() -> None:
    plain = recipe(speculation__method="none", speculation__draft=None)
    assert "does not speculate" in " ".join(plan_recipe(plain, {"hardware": "cpu"}).notes)
    found = predict_recipe(plain)
    assert found.k == 0 and found.speedup == {} and found.alpha == 1.0
    assert found.stages["generation"] == pytest.approx(found.plain_generation_s)
    assert "speculation" not in found.text().splitlines()[1]


def test_drafters_without_weights_and_trees_are_taken_for_what_costs_alike() -> None:
    looked_up = read_recipe(recipe(speculation__method="trie", speculation__draft=None), {}, here=HERE)
    assert looked_up.spec.method == "ngram" and looked_up.spec.acceptance == 0.55
    assert looked_up.machine is not None and looked_up.machine.engine.draft_fixed_s == 0.0
    tree = read_recipe(recipe(speculation__method="graft"), {}, here=HERE)
    assert tree.spec.method == "tree" and "counted as a chain of k" in " ".join(tree.assumed)


def test_a_drafter_from_outside_is_planned_from_measurements_or_refused(tmp_path: Path) -> None:
    strange = recipe(speculation__method="my_package:Drafter", speculation__draft=None, speculation__k=3)
    for changes in ({}, {"hardware": "H100", "model": "Qwen3-8B"}):
        with pytest.raises(
            UserError,
            match="The simulator has no cost model for the drafter 'my_package:Drafter'; it has one for eagle3",
        ):
            plan_recipe(strange, {"hardware": "cpu"} | changes)
    with pytest.raises(UserError, match="no cost model for the drafter"):
        predict_recipe(strange)
    rows = [
        row | {"method": "my_package:Drafter"} if row["k"] else row
        for row in bench_rows(LinearEngine(0.04, 0.002, 1e-6, 0.003, 0.0008, 0.004, 0.0002))
    ]
    table = read_cost_table(write_table(tmp_path / "bench.json", rows))
    for changes in ({"hardware": "cpu"}, {"hardware": "H100", "model": "Qwen3-8B"}):
        result = plan_recipe(strange, changes, table)
        assert result.spec["method"] == "my_package:Drafter" and result.drafter["step_s"] > 0
        assert result.speculative["alpha"] == pytest.approx(1 + 0.7 + 0.49 + 0.343)


def test_lag_on_one_machine_is_said_to_bring_nothing() -> None:
    lagged = read_recipe(recipe(loop__lag=2), {}, here=HERE)
    assert lagged.spec.lag == 0 and "planned without lag" in " ".join(lagged.assumed)
    assert read_recipe(recipe(loop__lag=2), {"gpus": 2}, here=HERE).spec.lag == 2


def stages_of(data: dict[str, Any]) -> Stages:
    found = read_recipe(data, {}, here=HERE)
    return StepModel(found.spec, machine=found.machine, model=found.model).stages(0, 1, 1, 0)


def test_reference_recomputation_and_updates_cost_their_passes() -> None:
    base = stages_of(recipe())
    assert stages_of(recipe(train__kl=0.1)).logprob_s == pytest.approx(2 * base.logprob_s)
    recomputed = stages_of(recipe(train__gradient_checkpointing=True))
    update_s = (stages_of(recipe(train__updates_per_step=4)).train_s - base.train_s) / 3
    assert update_s > 0
    assert recomputed.train_s - update_s == pytest.approx(4 / 3 * (base.train_s - update_s))


def test_a_cost_table_replaces_nominal_costs_and_brings_its_acceptance(tmp_path: Path) -> None:
    true = LinearEngine(0.04, 0.002, 1e-6, 0.003, 0.0008, 0.004, 0.0002)
    table = read_cost_table(write_table(tmp_path / "bench.json", bench_rows(true, noise=0.02)))
    found = read_recipe(recipe(speculation__k=3), {}, table, here=HERE)
    assert found.machine is not None
    assert found.machine.engine.step_s == pytest.approx(0.04, rel=0.1)
    assert found.machine.engine_band < 0.15 < found.machine.band == 1.0  # the learner stays nominal
    assert "36 rows of a cost table" in found.machine.origin
    assert found.spec.acceptance_lengths[3] == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    predicted = predict_recipe(recipe(speculation__k=3), table=table)
    assert predicted.alpha == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    lengths, slots = found.spec.trace, found.spec.slots
    rows_s = sum(lengths) * float(true.plain_s(slots, 150.0)) / slots
    assert predicted.plain_generation_s == pytest.approx(rows_s, rel=0.3)  # the drain's tail is dearer per token
    assert predicted.plain_generation_s > rows_s
    with pytest.raises(UserError, match="no rows of 'ngram'"):
        read_recipe(recipe(speculation__method="ngram", speculation__draft=None), {}, table, here=HERE)


def test_a_prediction_is_quick_and_says_what_it_rests_on() -> None:
    found, taken_s = predict_recipe(recipe()), []
    for _ in range(3):
        start_s = time.perf_counter()
        predict_recipe(recipe())
        taken_s.append(time.perf_counter() - start_s)
    assert min(taken_s) < 0.2
    said = found.text()
    assert "Nothing was measured on this machine: nominal figures of this CPU" in said
    assert "within a factor of 2" in said
    assert found.bands["generation"] > 1.0 and found.bands["train"] > found.bands["logprob"]
    json.dumps(found.to_dict(), allow_nan=False)
    assert prediction_text(found.to_dict()) == said


def test_an_accelerator_is_taken_by_the_name_that_torch_gives() -> None:
    local = predict_recipe(recipe("gsm8k"), device="NVIDIA H100 80GB HBM3")
    assert "one H100" in local.origin and local.step_s < predict_recipe(recipe("gsm8k")).step_s
    served = recipe("gsm8k", policy__model="Qwen3-8B")
    served["rollout"]["engine"] = "vllm"
    assert predict_recipe(served, device="NVIDIA H100 80GB HBM3").bands["generation"] > 0.5
    with pytest.raises(UserError, match="No accelerator is called 'NVIDIA L40S'"):
        predict_recipe(recipe(), device="NVIDIA L40S")


def test_the_policy_s_own_configuration_stands_in_for_an_unknown_name() -> None:
    strange = recipe(policy__model="me/my-model")
    with pytest.raises(UserError, match="No model shape is called 'me/my-model'"):
        predict_recipe(strange)
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    assert predict_recipe(strange, shape=shape | {"vocab_size": 512}).step_s > 0


def metric_lines(found: Any, factor: float = 1.0, steps: int = 4) -> list[dict[str, float]]:
    """What a run would have logged, had each stage taken `factor` times what was predicted."""
    spec = found.basis.spec
    seconds = {stage: factor * found.stages[stage] for stage in STAGES}
    line: dict[str, float] = {f"time/{stage}": value for stage, value in seconds.items()}
    line |= {"time/step": sum(seconds.values()), "perf/gen_tokens": found.tokens, "reward/zero_std_groups": 0.0}
    line |= {"length/prompt_mean": float(spec.prompt_tokens), "length/mean": found.tokens / found.rollouts}
    line |= {"spec/acceptance_length": found.alpha}
    last = 1.0
    for k in range(1, found.k + 1):
        alpha = float(found.basis.spec.acceptance_lengths[k])
        line[f"spec/acceptance_pos_{k}"], last = alpha - last, alpha
    return [{"step": step} | line for step in range(1, steps + 1)]


def test_a_run_that_went_as_predicted_compares_without_error() -> None:
    found = predict_recipe(recipe(speculation__k=3))
    judged = compare(found, [*metric_lines(found), {"step": 4, "eval/reward": 0.5}])
    assert judged["steps"] == 4
    for row in judged["stages"]:
        assert row["error"] == pytest.approx(0.0, abs=1e-6) and row["within"], row
        assert row["error_given"] == pytest.approx(0.0, abs=0.02), row
    json.dumps(judged, allow_nan=False)
    assert comparison_text(judged) == judged["text"]


def test_a_run_twice_as_slow_is_off_by_half_and_one_four_times_leaves_the_band() -> None:
    found = predict_recipe(recipe(speculation__k=3))
    for factor, within in ((1.9, True), (6.0, False)):
        rows = {row["stage"]: row for row in compare(found, metric_lines(found, factor))["stages"]}
        assert rows["step"]["error"] == pytest.approx(1 / factor - 1)
        assert rows["logprob"]["within"] is within


def test_unknown_inputs_are_told_apart_from_wrong_constants() -> None:
    found = predict_recipe(recipe(speculation__k=3))
    lines = metric_lines(found)
    for line in lines:  # answers half as long, and half of the groups without a gradient
        for name in ("time/generation", "time/logprob", "time/train", "perf/gen_tokens", "length/mean"):
            line[name] *= 0.5
        line["reward/zero_std_groups"] = 0.5
        line["length/prompt_mean"] *= 0.5
    rows = {row["stage"]: row for row in compare(found, lines)["stages"]}
    for name in ("generation", "logprob"):
        assert rows[name]["error"] == pytest.approx(1.0)
        assert abs(rows[name]["error_given"]) < 0.12, rows[name]
    assert rows["train"]["error_given"] < -0.2  # a quarter of the work was predicted, half was measured


def test_a_run_without_a_finished_step_has_nothing_to_compare() -> None:
    judged = compare(predict_recipe(recipe()), [{"step": 0, "eval/reward": 0.1}])
    assert judged["steps"] == 0 and "no finished step" in judged["text"]
