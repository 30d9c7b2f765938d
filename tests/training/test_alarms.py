"""An engine of another model, and updates that cannot be made, are warned of, then end a run; a metric never does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import forerun
from forerun.config import Recipe
from forerun.errors import UserError
from forerun.learner.objective import Objective, Scored, mismatch_by_version
from forerun.models.logprobs import token_entropy
from forerun.report.lines import step_line
from forerun.tracking.metrics import checked_metrics
from forerun.training.alarms import Alarms
from forerun.training.checkpoint import complete_checkpoints
from forerun.types import Rollout
from kill_runs import lines, write_recipe


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    plain: dict[str, Any] = {"speculation": {"method": "none"}, "checkpoint": {"every": 0}, "eval": {"prompts": 0}}
    return write_recipe(tmp_path, tiny("llama"), **plain)


def steps_of(recipe: Path) -> list[dict[str, Any]]:
    return lines(recipe.parent / "runs" / "latest" / "metrics.jsonl")


def alarms(**rollout: Any) -> tuple[Alarms, Objective]:
    data = {"policy": {"model": "x"}, "task": {"name": "jsonl"}, "rollout": rollout}
    settings = Recipe.model_validate(data)
    return Alarms(settings), Objective(settings.train, 1)


def test_a_mismatch_is_warned_of_once_and_ends_the_run_when_it_stays() -> None:
    alarm, objective = alarms()
    for step, kl in enumerate([1e-9, 0.018, 0.06, 0.7, 0.8, 0.01, 0.2, 0.9, math.nan], 1):
        alarm.observe(step, {"mismatch/kl": kl}, objective)
        alarm.check()
    assert [text.split(" at step ")[1][0] for text in alarm.warnings if "mismatch/kl is" in text] == ["3", "7"]
    alarm.observe(10, {"mismatch/kl": 2.0}, objective)
    with pytest.raises(UserError, match=r"mismatch/kl is 2 .* for 3 steps in a row more than rollout"):
        alarm.check()
    asked, objective = alarms(mismatch_stop=3.0, mismatch_warn=2.5)
    for step in range(9):
        asked.observe(step, {"mismatch/kl": 2.0}, objective)
        asked.check()
    assert not asked.warnings


def test_engine_and_learner_are_compared_by_one_version() -> None:
    def rollout(version: int, logprob: float) -> Rollout:
        return Rollout([1], [2, 3], [logprob] * 2, [version] * 2, "eos")

    old, new, mixed = rollout(3, -2.0), rollout(4, -1.0), Rollout([1], [2, 3], [-9.0] * 2, [3, 4], "eos")
    scored = Scored([torch.full((2,), -1.0)] * 3, None, 0.0)
    found = mismatch_by_version([old, new, mixed], scored, 4, [], None)
    assert found["mismatch/kl"] == 0 and (found["async/kl"] or 0) > 1
    one = Scored(scored.logprobs[:1], None, 0.0)
    older = mismatch_by_version([old, mixed], Scored(scored.logprobs[:2], None, 0.0), 4, [], None)
    assert older["mismatch/kl"] is None
    probed = Scored([torch.full((2,), -1.5)], None, 0.0)
    assert (
        mismatch_by_version([old], Scored(scored.logprobs[:1], None, 0.0), 4, [new], probed)["mismatch/kl"] or 0
    ) > 0.1
    same = mismatch_by_version([new], one, 4, [], None)
    assert same["mismatch/kl"] == 0 and "async/kl" not in same


def test_a_run_with_an_engine_of_another_model_ends_with_a_checkpoint(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"for 2 steps in a row .* the rollouts are another model's"):
        forerun.train(str(recipe), {"rollout.engine": "broken_parts:WrongEngine", "rollout.mismatch_steps": 2})
    assert [row["step"] for row in steps_of(recipe)] == [1, 2] and steps_of(recipe)[0]["mismatch/kl"] > 1.5
    assert [p.name for p in complete_checkpoints(recipe.parent / "runs" / "latest" / "checkpoints")] == ["step-000002"]


def test_updates_that_cannot_be_made_are_skipped_and_end_the_run_when_they_stay(recipe: Path) -> None:
    words = {"train.algorithm": "broken_parts:BROKEN", "train.max_skipped_updates": 2}
    with pytest.raises(UserError, match=r"2 policy updates in a row .* the last in step 2 .*look into the algo"):
        forerun.train(str(recipe), words)
    rows = steps_of(recipe)
    assert [row["policy/skipped_updates"] for row in rows] == [1, 1] and rows[0]["policy/loss"] is None
    assert rows[1]["policy/grad_norm"] == 0 and rows[0]["reward/mean"] is not None
    summary = forerun.train(str(recipe), words | {"train.max_skipped_updates": 9, "train.steps": 2})
    told = [text for text in summary["warnings"] if "were skipped" in text or "Not finite" in text]
    assert len(told) == 3 and "Not finite at step 1, and recorded as null: policy/loss, policy/ratio_mean" in told


def test_a_metric_that_is_not_finite_is_null_and_told_once() -> None:
    alarm, objective = alarms()
    for step in (1, 2):
        alarm.observe(step, {"length/mean": math.inf, "reward/mean": 1.0}, objective)
        alarm.check()
    assert alarm.warnings == ["Not finite at step 1, and recorded as null: length/mean"]
    with pytest.raises(UserError):
        checked_metrics(1, {"length/mean": math.inf})  # a run folder takes none, a run asks it for none


def test_a_token_that_a_model_masks_has_no_part_in_the_entropy() -> None:
    logits = torch.randn(3, 7)
    masked = torch.cat([logits, torch.full((3, 2), -math.inf)], dim=1)
    assert torch.allclose(token_entropy(masked, 1.0), token_entropy(logits, 1.0), atol=1e-6)


def test_the_step_line_shows_the_mismatch_and_the_penalty_only_where_there_is_one() -> None:
    line = step_line(1, 2, {"policy/kl": 0.0, "mismatch/kl": 2.1e-4}, None, None)
    assert "mismatch 2e-4" in line and "kl 0" not in line
    assert "kl 0.10 | mismatch 0" in step_line(1, 2, {"policy/kl": 0.1, "mismatch/kl": 0.0}, None, None)
