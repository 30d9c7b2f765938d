"""A run whose learner is sharded is the run of one process, and goes on bit for bit from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import forerun
from forerun.events import CountStream, finish
from forerun.learner.distributed import LearnerGroup
from forerun.training.run import resumed_recipe, run

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps of a tiny model on twenty sums."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "ranks",
        "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "rollout": {"slots": 8, "max_new_tokens": 12},
        "train": {"steps": 2, "prompts_per_step": 3, "samples_per_prompt": 4, "learning_rate": 1e-3},
        "eval": {"prompts": 0},
        "checkpoint": {"every": 1},
    }
    path = tmp_path / "ranks.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def steps_of(folder: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "perf/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if "reward/mean" in row]


def test_two_ranks_are_the_run_of_one_process(recipe: Path) -> None:
    """Rewards and lengths are equal; losses, norms and log-probabilities within 1e-3 (float32, one AdamW step)."""
    alone, ranks = forerun.train(str(recipe)), forerun.train(str(recipe), {"train.ranks": 2})
    expected, found = steps_of(alone["run"]), steps_of(ranks["run"])
    assert len(found) == len(expected) == 2 and any(row["policy/grad_norm"] > 1e-3 for row in expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.startswith(("reward/", "rollout/")):
                assert mine[name] == value, name
            else:
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name

    half = forerun.train(str(recipe), {"train.ranks": 2, "train.steps": 1})
    assert (Path(half["run"]) / "checkpoints" / "step-000001" / "learner" / ".metadata").is_file()
    continued = finish(run(resumed_recipe(Path(half["run"]), {"train.steps": 2}), resume=Path(half["run"])))
    assert continued["weights"] == ranks["weights"] and steps_of(continued["run"]) == found


def test_a_run_that_loses_a_rank_goes_back_by_itself(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second step's update: from the first step's checkpoint it ends where an undisturbed run ends.

    Its ranks share each layer's matrices; those of `test_twenty_kills.py` do not.
    """
    words = {"train.ranks": 2, "train.tensor_parallel": 2}
    undisturbed = forerun.train(str(recipe), words)
    update, calls = LearnerGroup.update, []

    def killing(self: LearnerGroup, *arguments: Any) -> CountStream[dict[str, float]]:
        calls.append(len(self.pids))
        if len(calls) == 2:
            os.kill(self.pids[1], signal.SIGKILL)
        return update(self, *arguments)

    monkeypatch.setattr(LearnerGroup, "update", killing)
    summary = forerun.train(str(recipe), words)
    assert calls == [2, 2, 2]  # the second step's twice
    (warning,) = (words for words in summary["warnings"] if "goes back" in words)
    assert "goes back to step-000001" in warning and "Rank 1 of the learner" in warning
    assert summary["weights"] == undisturbed["weights"] and steps_of(summary["run"]) == steps_of(undisturbed["run"])
