"""Runs that are killed at every stage, driver and replicas: they end as if nothing had happened, to the last bit.

Engines decode one sequence at a time here, so that a sample does not depend on what ran beside it, by rounding neither.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import forerun
from forerun.engine import replicated as replicas
from forerun.errors import UserError
from forerun.events import finish
from forerun.learner.distributed import LearnerGroup
from forerun.report.console import Console, follow
from forerun.training import loop, prefetch, rollout
from forerun.training import run as runs
from forerun.training.checkpoint import check_sizes, complete_checkpoints, newest_checkpoint
from forerun.training.restart import Restarts
from forerun.training.run import resumed_recipe, run
from forerun.training.state import Run
from forerun.workers.group import RanksLost
from kill_driver import LIMIT_S, POINTS, Hand
from kill_runs import PROMPTS, Zygote, faults, lines, write_recipe


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums for a tiny model; a drafter that is trained before step 1 and after every second step."""
    folder = tmp_path_factory.mktemp("kills")
    return write_recipe(folder, tiny("llama"), speculation={"train": "every-2"})


@pytest.fixture(scope="module", autouse=True)
def rewards_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """A test whose run hangs in this process fails, and blocks nobody."""

    def end(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"no end after {LIMIT_S} s")  # no Exception, which might be taken for a loss

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Callable[[int], dict[str, Any]]:
    """undisturbed(steps) -> summary of a run that nobody killed, in one process."""
    made: dict[int, dict[str, Any]] = {}

    def of(steps: int) -> dict[str, Any]:
        if steps not in made:
            made[steps] = forerun.train(str(recipe), {"train.steps": steps})
        return made[steps]

    return of


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    made = Zygote(tmp_path)
    yield made
    made.close()


def facts(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run without its times and without what tells of the losses."""
    apart = ("time/", "perf/", "replicas/")
    rows = lines(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(apart)} for row in rows]


def same_end(folder: Path, whole: dict[str, Any]) -> None:
    """The same metrics, samples and weights as the undisturbed run, bit for bit, and each once."""
    summary = json.loads((folder / "summary.json").read_text())
    assert folder != Path(whole["run"]) and faults(folder) == []
    assert facts(folder) == facts(whole["run"])
    assert lines(folder / "rollouts.jsonl") == lines(Path(whole["run"]) / "rollouts.jsonl")
    assert summary["weights"] == whole["weights"] and summary["steps"] == whole["steps"]
    for name in ("policy", "drafter"):
        (mine,), (other,) = (list((Path(p) / "hf" / name).glob("*.safetensors")) for p in (folder, whole["run"]))
        assert mine.read_bytes() == other.read_bytes()


# ---- what kills ----


@pytest.mark.slow
def test_a_replica_killed_at_each_stage_changes_nothing(
    recipe: Path, undisturbed: Callable[[int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    points = ["data", "prepare", "generation", "rollouts", "logprob", "train", "checkpoint"]
    kills = [{"step": i, "point": point, "who": "replica"} for i, point in enumerate(points)]
    keep_hands_off(monkeypatch)
    hand = Hand(kills, str(tmp_path / "struck.jsonl"))
    hand.arm()
    summary = forerun.train(str(recipe), {"train.steps": len(POINTS), "rollout.replicas": 1})
    assert hand.kills == [] and len([w for w in summary["warnings"] if "killed by signal 9" in w]) >= 1
    assert lines(Path(summary["run"]) / "metrics.jsonl")[-2]["replicas/lost"] == len(points)
    same_end(Path(summary["run"]), undisturbed(len(POINTS)))


@pytest.mark.slow
def test_a_driver_killed_at_each_point_changes_nothing(
    recipe: Path, undisturbed: Callable[[int], dict[str, Any]], zygote: Zygote
) -> None:
    """One run that dies at each point in turn and is resumed; the last death is after the last step."""
    plans = [[{"step": i + 1, "point": point, "who": "driver"}] for i, point in enumerate(POINTS[:-1])]
    steps = len(plans) + 1
    plans.append([{"step": steps - 1, "point": "finishing", "who": "driver"}])
    folder = zygote.lives(recipe, [f"train.steps={steps}"], plans)
    assert [s["point"] for s in zygote.struck] == list(POINTS)
    same_end(folder, undisturbed(steps))


@pytest.mark.slow
def test_a_resume_that_forgets_to_truncate_is_seen(recipe: Path, zygote: Zygote) -> None:
    """The negative control of the accounting: killed before its checkpoint, a step is in the logs twice."""
    plans = [[{"step": 1, "point": "checkpoint", "who": "driver"}]]
    folder = zygote.lives(recipe, ["train.steps=3"], plans, sabotage="truncate")
    told = faults(folder)
    assert "steps are [1, 2, 2, 3]" in told and sum("4 expected, 8 found" in words for words in told) == PROMPTS


def keep_hands_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a `Hand` puts in place goes away with the test."""
    from forerun.training import checkpoint

    for owner, names in (
        (loop, ("evaluate",)), (runs, ("finish_run",)), (rollout, ("generate",)), (prefetch, ("generate",)),
        (rollout.SynchronousSource, ("next",)), (prefetch.AsynchronousSource, ("next",)), (Run, ("_checkpoint",)),
        (Console, ("show",)), (LearnerGroup, ("save", "restore")), (checkpoint, ("_flush", "_put_in_place")),
        (checkpoint.torch, ("save",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))


# ---- what goes back by itself ----


@pytest.fixture
def no_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lost replica is one too many."""
    monkeypatch.setattr(replicas, "LOSSES", 0)


def lose(monkeypatch: pytest.MonkeyPatch, folder: Path, steps: list[int]) -> Hand:
    """A replica dies before the generation of each of the steps, once per entry."""
    keep_hands_off(monkeypatch)
    hand = Hand([{"step": s, "point": "generation", "who": "replica"} for s in steps], str(folder / "struck.jsonl"))
    hand.at = partial(once, hand)  # type: ignore[method-assign]
    hand.arm()
    return hand


def once(hand: Hand, point: str) -> None:
    """Of several equal kills only the first is due; the others are for the next time that the run comes by."""
    later = [k for i, k in enumerate(hand.kills) if k in hand.kills[:i]]
    hand.kills = [k for i, k in enumerate(hand.kills) if k not in hand.kills[:i]]
    Hand.at(hand, point)
    hand.kills += later


@pytest.mark.slow
@pytest.mark.parametrize(("every", "goes_back_to"), [(2, "step-000002"), (0, "step 0")])
def test_a_run_that_loses_its_replicas_goes_back_by_itself(
    recipe: Path, undisturbed: Callable[[int], dict[str, Any]], no_successor: None, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, every: int, goes_back_to: str,
) -> None:  # fmt: skip
    hand = lose(monkeypatch, tmp_path, [3])
    summary = forerun.train(str(recipe), {"train.steps": 5, "rollout.replicas": 1, "checkpoint.every": every})
    assert hand.kills == []
    (warning,) = (w for w in summary["warnings"] if "goes back" in w)
    assert f"goes back to {goes_back_to} (restart 1 of 3 from there)" in warning and "killed by signal 9" in warning
    same_end(Path(summary["run"]), undisturbed(5))


@pytest.mark.slow
def test_a_run_that_loses_them_every_time_gives_up(
    recipe: Path, no_successor: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hand = lose(monkeypatch, tmp_path, [2] * 5)
    console = Console(4)
    recipe_data = {"train.steps": 4, "rollout.replicas": 1, "checkpoint.restarts": 1}
    with pytest.raises(replicas.ReplicasLost, match="killed by signal 9"):
        follow(run(forerun.config.load_recipe(str(recipe), recipe_data)), console)
    assert len(hand.kills) == 3 and sum("goes back" in w for w in console.warnings) == 1
    folder = (recipe.parent / "runs" / "latest").resolve()
    assert [r["step"] for r in lines(folder / "metrics.jsonl") if "reward/mean" in r] == [1, 2]  # and can be resumed


def test_restarts_are_counted_between_checkpoints(tmp_path: Path) -> None:
    restarts, lost = Restarts(2), replicas.ReplicasLost("Replica 0 died")
    warnings: list[str] = []

    def grant(folder: Path | None) -> Path:
        granted, warning = restarts.grant(lost, folder)
        warnings.append(warning)
        return granted

    def reach(step: int) -> None:
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "complete").touch()

    for _ in range(2):
        assert grant(tmp_path) == tmp_path
    reach(1)
    for _ in range(2):  # progress gives both again, and a run that was lost while it began is the same run
        assert grant(None) == tmp_path
    with pytest.raises(replicas.ReplicasLost):
        restarts.grant(lost, tmp_path)
    assert len(warnings) == 4
    assert "step 0 (restart 2 of 2" in warnings[1] and "step-000001 (restart 1 of 2" in warnings[2]
    with pytest.raises(replicas.ReplicasLost):
        Restarts(2).grant(lost, None)  # there is no run yet


def test_the_same_exception_without_a_step_in_between_ends_the_run(tmp_path: Path) -> None:
    restarts, bug = Restarts(9), RanksLost("Rank 0 ended", "TypeError: no tensor (loss.py:3)")
    restarts.grant(bug, tmp_path, 0)
    restarts.grant(bug, tmp_path, 1)  # a step was made
    restarts.grant(RanksLost("Rank 0 was killed by signal 9"), tmp_path, 1)  # something else
    restarts.grant(bug, tmp_path, 2)
    with pytest.raises(RanksLost):
        restarts.grant(bug, tmp_path, 2)


# ---- broken checkpoints ----


def spoil(path: Path, how: str) -> None:
    """Cut a file in half, or put zeros in place of its bytes, as a power cut does."""
    size = path.stat().st_size
    if how == "cut":
        os.truncate(path, size // 2)
    elif how == "zeros":
        path.write_bytes(bytes(size))
    else:
        path.unlink()


@pytest.fixture(scope="module")
def begun(recipe: Path) -> Path:
    """A run of three steps with the checkpoints of the last two; to be copied."""
    return Path(forerun.train(str(recipe), {"train.steps": 3})["run"])


@pytest.mark.parametrize(
    ("file", "how", "words"),
    [
        ("optimizer.pt", "cut", "optimizer.pt has"),
        ("optimizer.pt", "zeros", "cannot be used"),
        ("history.json", "zeros", "cannot be used"),
        ("policy/model.safetensors", "cut", "model.safetensors has"),
        ("policy/model.safetensors", "zeros", "cannot be used"),
        ("drafter/config.json", "missing", "cannot be used"),
    ],
)
def test_a_broken_checkpoint_is_passed_over_and_told(
    begun: Path, tmp_path: Path, undisturbed: Callable[[int], dict[str, Any]], file: str, how: str, words: str
) -> None:
    half = Path(shutil.copytree(begun, tmp_path / "half"))
    spoil(half / "checkpoints" / "step-000003" / file, how)
    (half / "checkpoints" / "step-000004.partial").mkdir()
    summary = finish(run(resumed_recipe(half, {"train.steps": 5}), half))
    told = [w for w in summary["warnings"] if "the run goes on from step-000002" in w]
    assert len(told) == 2 and words in told[0] and str(half / "checkpoints" / "step-000003") in told[0]
    assert "step-000004" in told[1] and "cut off" in told[1]
    assert [p.name for p in complete_checkpoints(half / "checkpoints")] == ["step-000004", "step-000005"]
    assert summary["weights"] == undisturbed(5)["weights"] and faults(half, {"train.steps": 5}) == []


def test_without_a_whole_checkpoint_a_run_is_not_resumed(begun: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(begun, tmp_path / "half"))
    kept = complete_checkpoints(half / "checkpoints")
    for checkpoint in kept:
        spoil(checkpoint / "random.pt", "cut")
    with pytest.raises(UserError, match=r"step-000003 cannot be used: random\.pt has .* no other checkpoint of"):
        finish(run(resumed_recipe(half, {"train.steps": 4}), resume=half))
    assert complete_checkpoints(half / "checkpoints") == kept  # nothing was renamed


def test_an_evaluation_at_the_end_is_not_made_twice(begun: Path, tmp_path: Path) -> None:
    """Killed after its last step, when only the summary is missing."""
    done = Path(shutil.copytree(begun, tmp_path / "done"))
    (done / "summary.json").unlink()
    finish(run(resumed_recipe(done, {}), resume=done))
    assert faults(done) == []


def test_a_checkpoint_tells_the_size_of_every_file(begun: Path) -> None:
    checkpoint = newest_checkpoint(begun)
    mark = json.loads((checkpoint / "complete").read_text())
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert mark["step"] == 3 and set(mark["bytes"]) == files - {"complete"}
    check_sizes(checkpoint)
