"""Runs that are killed at every stage, driver and replicas: they end as if nothing had happened, to the last bit.

Engines decode one sequence at a time here, so that a sample does not depend on what ran beside it, by rounding neither.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from kill_driver import POINTS, Hand

import forerun
from forerun.engine import replicas
from forerun.errors import UserError
from forerun.learner.checkpoint import check_sizes, complete_checkpoints, newest_checkpoint
from forerun.loop import loop
from forerun.loop.loop import resumed_recipe, run
from forerun.loop.recover import Restarts
from forerun.loop.setup import prompts_of_step
from forerun.report.console import Console
from forerun.tasks import load_task

PROMPTS, SAMPLES = 3, 4


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums for a tiny model; a drafter that is trained before step 1 and after every second step."""
    folder = tmp_path_factory.mktemp("kills")
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "kills",
        "runs": str(folder / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(folder / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "eagle3", "k": 3, "train": "every-2"},
        "draft": {"rollouts": 16, "epochs": 1, "depth": 2, "vocab": 30},
        "rollout": {"slots": 1, "max_new_tokens": 10},
        "train": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "learning_rate": 1e-3},
        "eval": {"every": 4, "prompts": 2},
        "checkpoint": {"every": 1},
    }
    path = folder / "kills.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module", autouse=True)
def rewards_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Callable[[int], dict[str, Any]]:
    """undisturbed(steps) -> summary of a run that nobody killed, in one process."""
    made: dict[int, dict[str, Any]] = {}

    def of(steps: int) -> dict[str, Any]:
        if steps not in made:
            made[steps] = forerun.train(str(recipe), {"train.steps": steps})
        return made[steps]

    return of


class Zygote:
    """`kill_driver.py`, waiting to be asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "kill_driver.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def live(self, words: list[str], kills: list[dict[str, Any]], sabotage: str = "") -> int:
        """One life of a driver; its exit code, or minus the signal."""
        order = {
            "words": words, "kills": kills, "sabotage": sabotage, "out": str(self.folder / "out.txt"),
            "struck": str(self.folder / "struck.jsonl"),
        }  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(json.loads(self.process.stdout.readline())["code"])

    @property
    def said(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def struck(self) -> list[dict[str, Any]]:
        path = self.folder / "struck.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def lives(self, recipe: Path, words: list[str], plans: list[list[dict[str, Any]]], sabotage: str = "") -> Path:
        """Start a run and resume it until it ends: life i has the kills of plan i, the last one of which is its own."""
        latest = recipe.parent / "runs" / "latest"
        for number, plan in enumerate([*plans, []]):
            begin = ["train", str(recipe), *words] if number == 0 else ["train", "--resume", str(latest)]
            code = self.live(begin, plan, sabotage)
            assert code == (-9 if plan else 0), f"life {number} with {plan} ended with {code}: {self.said}"
        return latest.resolve()


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    made = Zygote(tmp_path)
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=60)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def faults(folder: Path, changes: dict[str, Any] | None = None) -> list[str]:
    """What the logs of a run do not account for: every step, evaluation and sample has to be there exactly once."""
    recipe = resumed_recipe(folder, changes or {})
    steps = recipe.train.steps
    rows, samples = lines(folder / "metrics.jsonl"), lines(folder / "rollouts.jsonl")
    found = [r["step"] for r in rows if "reward/mean" in r]
    wrong = [] if found == list(range(1, steps + 1)) else [f"steps are {found}"]
    evaluated = [r["step"] for r in rows if "eval/reward" in r]
    if evaluated != sorted({0, *range(recipe.eval.every, steps, recipe.eval.every), steps}):
        wrong.append(f"evaluations are after {evaluated}")
    expected: Counter[tuple[int, str, str]] = Counter()
    task = load_task(recipe.task, recipe.seed)
    for step in range(steps):
        chosen = prompts_of_step(task.problems("train"), step, recipe.train.prompts_per_step, recipe.seed)
        for place, problem in enumerate(chosen):
            expected[step + 1, f"{step + 1}/{place}", problem.question] += recipe.train.samples_per_prompt
    counted = Counter((s["step"], s["prompt_id"], s["prompt"][len("<u>") : -len("<a>")]) for s in samples)
    wrong += [f"{key}: {expected[key]} expected, {counted[key]} found" for key in expected.keys() | counted.keys()
              if expected[key] != counted[key]]  # fmt: skip
    return wrong


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
    from forerun.learner import checkpoint

    for owner, names in (
        (loop.Training, ("_step", "_finish", "_checkpoint")), (loop.StageTimer, ("stage",)), (Console, ("progress",)),
        (checkpoint, ("_flush", "_put_in_place")), (checkpoint.torch, ("save",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))


# ---- what goes back by itself ----


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lost replica is one too many."""
    monkeypatch.setattr(replicas, "Patience", partial(replicas.Patience, losses=0))


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
    recipe: Path, undisturbed: Callable[[int], dict[str, Any]], impatient: None, monkeypatch: pytest.MonkeyPatch,
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
    recipe: Path, impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hand = lose(monkeypatch, tmp_path, [2] * 5)
    console = Console(4)
    recipe_data = {"train.steps": 4, "rollout.replicas": 1, "checkpoint.restarts": 1}
    with pytest.raises(replicas.ReplicasLost, match="killed by signal 9"):
        run(forerun.config.load_recipe(str(recipe), recipe_data), console)
    assert len(hand.kills) == 3 and sum("goes back" in w for w in console.warnings) == 1
    folder = (recipe.parent / "runs" / "latest").resolve()
    assert [r["step"] for r in lines(folder / "metrics.jsonl") if "reward/mean" in r] == [1, 2]  # and can be resumed


def test_restarts_are_counted_between_checkpoints(tmp_path: Path) -> None:
    told: list[str] = []
    restarts, lost = Restarts(2, told.append), replicas.ReplicasLost("Replica 0 died")

    def reach(step: int) -> None:
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "complete").touch()

    for _ in range(2):
        assert restarts.grant(lost, tmp_path) == tmp_path
    reach(1)
    for _ in range(2):  # progress gives both again, and a run that was lost while it began is the same run
        assert restarts.grant(lost, None) == tmp_path
    with pytest.raises(replicas.ReplicasLost):
        restarts.grant(lost, tmp_path)
    assert len(told) == 4 and "step 0 (restart 2 of 2" in told[1] and "step-000001 (restart 1 of 2" in told[2]
    with pytest.raises(replicas.ReplicasLost):
        Restarts(2, told.append).grant(lost, None)  # there is no run yet


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
    console = Console(5)
    summary = run(resumed_recipe(half, {"train.steps": 5}), console, half)
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
        run(resumed_recipe(half, {"train.steps": 4}), resume=half)
    assert complete_checkpoints(half / "checkpoints") == kept  # nothing was renamed


def test_an_evaluation_at_the_end_is_not_made_twice(begun: Path, tmp_path: Path) -> None:
    """Killed after its last step, when only the summary is missing."""
    done = Path(shutil.copytree(begun, tmp_path / "done"))
    (done / "summary.json").unlink()
    run(resumed_recipe(done, {}), resume=done)
    assert faults(done) == []


def test_a_checkpoint_tells_the_size_of_every_file(begun: Path) -> None:
    checkpoint = newest_checkpoint(begun)
    mark = json.loads((checkpoint / "complete").read_text())
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert mark["step"] == 3 and set(mark["bytes"]) == files - {"complete"}
    check_sizes(checkpoint)
