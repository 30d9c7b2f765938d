"""Whatever ends a run after its first step leaves a checkpoint and says how to go on. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import forerun
from forerun.config import load_recipe
from forerun.errors import Interrupted, UserError
from forerun.events import StepDone, finish, to_its_end
from forerun.learner.learner import Learner
from forerun.learner.optimizer import MasterOptimizer
from forerun.models.checks import loading
from forerun.registry import load_path
from forerun.training import run as runs
from forerun.training.checkpoint import complete_checkpoints, read_history
from forerun.training.ending import as_sentence
from forerun.training.interrupt import StopRequest, stop_request
from forerun.training.run import resumed_recipe, run
from kill_runs import lines, write_recipe
from signals import hear_signals

HELPERS = str(Path(__file__).parents[1] / "helpers")


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that never writes a checkpoint of itself."""
    monkeypatch.syspath_prepend(HELPERS)
    blocks: dict[str, Any] = {"speculation": {"method": "none"}, "checkpoint": {"every": 0}, "eval": {"prompts": 0}}
    return write_recipe(tmp_path, tiny("llama"), **blocks)


def start(recipe: Path, *words: str, verb: str = "train", **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "forerun.cli", verb, str(recipe), "train.steps=500", *words]
    path = os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, text=True, preexec_fn=hear_signals, **streams
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.02)


def latest(recipe: Path) -> Path:
    return (recipe.parent / "runs" / "latest").resolve()


def has_steps(recipe: Path, count: int) -> bool:
    metrics = latest(recipe) / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) >= count


def left(recipe: Path) -> int:
    """The step of the only checkpoint, which is that of the last line of the log."""
    (checkpoint,) = complete_checkpoints(latest(recipe) / "checkpoints")
    step = read_history(checkpoint)["step"]
    assert step == lines(latest(recipe) / "metrics.jsonl")[-1]["step"] > 0
    return int(step)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_a_checkpoint(recipe: Path, number: signal.Signals, code: int) -> None:
    process = start(recipe, "rollout.replicas=1", start_new_session=True)
    wait_for(lambda: process.poll() is not None or has_steps(recipe, 2))
    for path in Path("/proc").glob("[0-9]*"):  # to all processes of the job, as SLURM does
        if path.name != str(process.pid) and parent_of(path) == process.pid:
            os.kill(int(path.name), number)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err == f"forerun: stopped by {number.name}\n"
    assert f"stopped after step {left(recipe)}; go on from" in out and f"--resume {latest(recipe)}" in out


def parent_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_run_well(recipe: Path) -> None:
    """`forerun train | head -1`."""
    process = start(recipe)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=120)
    err = process.stderr.read()
    assert process.returncode == 141 and "Traceback" not in err and "Exception ignored" not in err
    assert "stopped by SIGPIPE" in err and f"stopped after step {left(recipe)}" in " ".join(err.split())


@pytest.mark.slow
def test_a_full_output_is_one_sentence_and_a_checkpoint(recipe: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(recipe, stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err and "Exception ignored" not in err
    assert "The output of this command cannot be written (No space left on device)" in err


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_at_once(recipe: Path) -> None:
    """While the drafter is trained, by `train` and by `draft`, whose training is kept."""
    out = recipe.parent / "head"
    slow = ["speculation.method=eagle3", "draft.epochs=1000", "draft.patience=1000", "draft.rollouts=64"]
    for process in (start(recipe, *slow), start(recipe, *slow, "--out", str(out), verb="draft")):
        assert process.stdout is not None
        wait_for(lambda process=process: "drafter: epoch" in process.stdout.readline())  # type: ignore[misc]
        process.send_signal(signal.SIGTERM)
        said, err = process.communicate(timeout=30)
        assert process.returncode == 143 and err == "forerun: stopped by SIGTERM\n"
    assert "go on with the same command and --resume" in said and (out / "training" / "state.pt").exists()


def test_an_error_of_the_users_leaves_a_checkpoint_that_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in the third step, with nothing written until then."""
    score, events = Learner.score, []

    def failing(self: Learner, *rollouts: Any) -> Any:
        if self.updates == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity")
        return score(self, *rollouts)

    monkeypatch.setattr(Learner, "score", failing)
    with pytest.raises(UserError, match=r"Out of memory \(CUDA out of memory\): in generation lower rollout\.slots"):
        for event in run(load_recipe(str(recipe), {"task.reward": "rewards_for_tests:variety"})):
            events.append(str(event))
    assert left(recipe) == 2
    assert any(f"go on from step-000002 with: forerun train --resume {latest(recipe)}" in text for text in events)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(HELPERS)
    summary = finish(run(resumed_recipe(latest(recipe), {"train.steps": 4}), latest(recipe)))
    whole = forerun.train(str(recipe), {"task.reward": "rewards_for_tests:variety", "train.steps": 4})
    assert summary["steps"] == 4 and summary["weights"] == whole["weights"]


def test_an_update_that_fails_in_its_midst_leaves_none(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first of two optimizer steps the policy is no longer that of a finished step."""
    step = MasterOptimizer.step

    def failing(self: MasterOptimizer, rate: float) -> float:
        if self.updates == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return step(self, rate)

    monkeypatch.setattr(MasterOptimizer, "step", failing)
    words, events = {"train.updates_per_step": 2, "task.reward": "rewards_for_tests:variety"}, []
    with pytest.raises(UserError, match="Out of memory"):
        for event in run(load_recipe(str(recipe), words)):
            events.append(str(event))
    assert not complete_checkpoints(latest(recipe) / "checkpoints")
    assert any("the update of step 2 was broken off in its midst" in text for text in events)


def test_an_exception_of_the_consumer_waits_until_the_step_is_written_down(recipe: Path) -> None:
    """Thrown at the first event of the update, it ends the run after that step."""
    work = run(load_recipe(str(recipe), {"train.steps": 5}))
    event = next(work)
    while "stage='train'" not in str(event):
        event = next(work)
    event = work.throw(OSError("the display is gone"))
    while not isinstance(event, StepDone):
        event = next(work)
    with pytest.raises(OSError, match="the display is gone"):
        while True:
            next(work)
    assert left(recipe) == 1


def test_work_that_is_not_broken_off_returns_its_result() -> None:
    def work() -> Any:
        yield 1
        yield 2
        return 3

    def through() -> Any:
        return (yield from to_its_end(work()))

    running = through()
    assert next(running) == 1 and running.throw(KeyError("x")) == 2
    with pytest.raises(KeyError):
        next(running)


def test_a_second_signal_ends_at_once_and_one_before_the_loop_too() -> None:
    request = StopRequest()
    with pytest.raises(Interrupted) as caught:
        request.ask(signal.SIGTERM)
    assert caught.value.number == 15 and str(caught.value) == "stopped by SIGTERM"
    request = StopRequest()
    request.wait_for_safe_points()
    request.ask(signal.SIGHUP)
    assert request() and request.number == 1
    with pytest.raises(KeyboardInterrupt):
        request.ask(signal.SIGINT)


def test_no_library_takes_a_signal_for_an_error_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "signalled.py"
    file.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    with stop_request(), pytest.raises(Interrupted, match="SIGTERM"), loading("The model", tmp_path):
        load_path(f"{file}:reward")


def test_a_policy_that_is_not_finite_is_not_kept(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = runs.train_steps

    def spoiling(current: Any, source: Any) -> Any:
        for event in record(current, source):
            yield event
            if isinstance(event, StepDone):
                next(current.policy.model.parameters()).data[0] = float("nan")
                raise UserError("the end")

    monkeypatch.setattr(runs, "train_steps", spoiling)
    with pytest.raises(UserError, match="the end"):
        forerun.train(str(recipe))
    assert not complete_checkpoints(latest(recipe) / "checkpoints")


def test_a_policy_that_diverged_is_one_sentence(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"The policy has diverged.*lower train\.learning_rate"):
        forerun.train(str(recipe), {"train.learning_rate": 1e20, "task.reward": "rewards_for_tests:variety"})


def test_a_drafter_that_was_trained_before_the_first_step_is_kept(recipe: Path) -> None:
    words = {"speculation.method": "eagle3", "draft.rollouts": 16, "train.steps": 1}
    with pytest.raises(UserError, match="the trip is over"):
        for event in (work := run(load_recipe(str(recipe), words))):
            if "stage='generation'" in str(event):
                work.throw(UserError("the trip is over"))
    assert [p.name for p in complete_checkpoints(latest(recipe) / "checkpoints")] == ["step-000000"]
    assert finish(run(resumed_recipe(latest(recipe), {}), latest(recipe)))["steps"] == 1


def test_other_errors_stay_what_they_are() -> None:
    error = ValueError("a bug")
    assert as_sentence(error) is error
    assert "Out of memory" in str(as_sentence(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")))
