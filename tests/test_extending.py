"""A task, a drafter, an engine, an algorithm and a tracker from outside the package, each one file, make a run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import forerun
from forerun.config import load_recipe
from forerun.drafters import Drafter
from forerun.errors import UserError
from forerun.events import finish
from forerun.lossless.harness import Effort, verify_recipe
from forerun.training.run import run

EXTENSIONS = Path(__file__).parent / "extensions"
PARTS = {
    "task.name": "word_task:build",
    "speculation.method": "repeat_drafter:RepeatDrafter",
    "speculation.settings": {"times": 2},
    "rollout.engine": "counting_engine:CountingEngine",
    "train.algorithm": "plain_algorithm:REINFORCE",
    "trackers": ["list_tracker:ListTracker"],
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    for name in [path.stem for path in EXTENSIONS.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> str:
    data: dict[str, Any] = {
        "name": "extended",
        "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "size": 40},
        "speculation": {"k": 2},
        "rollout": {"slots": 4, "max_new_tokens": 8},
        "train": {"steps": 2, "prompts_per_step": 3, "samples_per_prompt": 4, "learning_rate": 1e-3},
        "eval": {"every": 0, "prompts": 2},
        "checkpoint": {"every": 0},
    }
    path = tmp_path / "extended.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def lines(folder: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "reward/mean" in line]


def check(summary: dict[str, Any]) -> None:
    """Every part was at work."""
    import list_tracker

    steps = lines(summary["run"])
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["policy/surprise"] > 0 for line in steps)  # the algorithm
    assert all(line["spec/k_mean"] == pytest.approx(2, abs=0.5) for line in steps)  # the drafter and its settings
    assert [line["replicas/count"] for line in steps] == [2, 3]  # the engine: an evaluation, then one stream a step
    assert (Path(summary["run"]) / "rollouts.jsonl").read_text().count('"prompt": "<u>say ') == 2 * 12  # the task
    assert [step for step, _ in list_tracker.LOGGED] == [0, 1, 2, 2]  # the tracker
    assert len(list_tracker.STARTED) == len(list_tracker.FINISHED) == 1


def test_parts_by_path(recipe: str) -> None:
    check(forerun.train(recipe, PARTS))


def test_parts_by_entry_point(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed package declares them, for this process and its workers."""
    names = {"words": PARTS["task.name"], "repeat": PARTS["speculation.method"], "counting": PARTS["rollout.engine"]}
    names |= {"reinforce": PARTS["train.algorithm"], "lists": PARTS["trackers"][0]}
    groups = zip(("tasks", "drafters", "engines", "algorithms", "trackers"), names, strict=True)
    installed = tmp_path / "site" / "parts-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Name: parts\nVersion: 1.0\n")
    lines = [f"[forerun.{group}]\n{name} = {names[name]}\n" for group, name in groups]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(installed.parent))
    words = dict(zip(PARTS, ["words", "repeat", {"times": 2}, "counting", "reinforce", ["lists"]], strict=True))
    check(finish(run(load_recipe(recipe, words))))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("speculation.method", "eagel3", "did you mean 'eagle3'"),
        ("rollout.engine", "lokal", "did you mean 'local'"),
        ("train.algorithm", "grpoo", "did you mean 'grpo'"),
        ("trackers", ["wandbb"], "No tracker is called 'wandbb'"),
    ],
)
def test_a_typo_is_answered_before_anything_is_loaded(recipe: str, key: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(recipe, {key: value})


def test_a_typo_in_a_task_names_the_nearest(recipe: str) -> None:
    with pytest.raises(UserError, match="did you mean 'jsonl'"):
        finish(run(load_recipe(recipe, {"task.name": "jsonll"})))


@pytest.mark.parametrize(
    ("key", "kind"), [("speculation.method", "drafter"), ("rollout.engine", "engine"), ("train.algorithm", "algorithm")]
)
def test_a_path_to_something_else_is_a_sentence(recipe: str, key: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"'word_task:build' is no {kind}: it has no "):
        finish(run(load_recipe(recipe, {"task.name": PARTS["task.name"], key: "word_task:build"})))


def test_a_loss_that_is_not_per_token_is_refused(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import plain_algorithm

    def mean(batch: Any, config: Any) -> Any:
        loss, sums = plain_algorithm.reinforce(batch, config)
        return loss.mean(), sums

    monkeypatch.setattr(plain_algorithm, "REINFORCE", dataclasses.replace(plain_algorithm.REINFORCE, loss=mean))
    with pytest.raises(UserError, match=r"has shape \[\] for \d+ tokens; it must return one number per token"):
        finish(run(load_recipe(recipe, {key: PARTS[key] for key in ("task.name", "train.algorithm")})))


def test_verification_accepts_a_drafter_without_weights(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that learns from the very texts that are tested. It is made anew, not copied: it may hold the policy."""
    monkeypatch.setattr(Drafter, "__deepcopy__", lambda *_: pytest.fail("a drafter was copied"), raising=False)
    changes = {"speculation.method": "trie", "task.name": PARTS["task.name"], "rollout.max_new_tokens": 12}
    effort = Effort(4, 2, 4, 400, 2, 8, 2, 2, 8)
    verdict = finish(verify_recipe(load_recipe(recipe, changes), effort=effort))
    assert verdict.passed, verdict.to_text()


def test_unknown_settings_of_a_drafter_are_refused(recipe: str) -> None:
    with pytest.raises(UserError, match="tines"):
        finish(run(load_recipe(recipe, PARTS | {"speculation.settings": {"tines": 2}})))
