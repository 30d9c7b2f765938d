"""Rollouts, evaluations and the drafter's data come from the engine that the recipe names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forerun
from extensions import counting_engine

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of another engine than the local one, which is out of reach."""

    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("the local engine was used")

    monkeypatch.setattr("forerun.training.state.LocalEngine", unwanted)
    monkeypatch.setattr("forerun.training.drafter.LocalEngine", unwanted)
    tests = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(tests / "helpers"))
    monkeypatch.setenv("PYTHONPATH", str(tests))  # of workers
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "other",
        "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "ngram", "k": 2},
        "draft": {"rollouts": 8, "epochs": 1, "depth": 2, "vocab": 30},
        "rollout": {"engine": "extensions.counting_engine:CountingEngine", "slots": 4, "max_new_tokens": 8},
        "train": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "learning_rate": 1e-3},
        "eval": {"every": 1, "prompts": 2},
        "checkpoint": {"every": 0},
    }
    path = tmp_path / "other.yaml"
    path.write_text(json.dumps(data))
    return str(path)


def evaluations(summary: dict[str, Any]) -> list[int]:
    written = (Path(summary["run"]) / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, written) if "eval/reward" in line]


def test_evaluation_and_drafter_data_of_a_synchronous_run(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[str] = []
    stream = counting_engine.CountingEngine.stream

    def counted(self: Any, *arguments: Any, **settings: Any) -> Any:
        streams.append(self.rule)
        return stream(self, *arguments, **settings)

    monkeypatch.setattr(counting_engine.CountingEngine, "stream", counted)
    summary = forerun.train(recipe, {"speculation.method": "eagle3", "eval.slots": 2})
    assert evaluations(summary) == [0, 1, 2]
    assert streams == ["plain"] + ["block"] * 5  # the drafter's data; an evaluation, then a step and one, twice


def test_evaluation_of_an_asynchronous_run(recipe: str) -> None:
    summary = forerun.train(recipe, {"loop.lag": 1, "rollout.replicas": 1, "train.steps": 3})
    assert evaluations(summary) == [0, 1, 2, 3]
    assert summary["weights"]["version"] == 3
