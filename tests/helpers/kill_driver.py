"""`forerun` in processes of its own that are killed, or lose a part, at a named point of a named step.

A script that reads one JSON object per line, forks a process for it that runs the command line, and answers with one
line: {"code": exit code, or minus the signal}. The libraries are loaded once, before the first fork.

    {"arguments": ["train", "--resume", "runs/latest"], "out": file, "struck": file,
     "kills": [{"step": 2, "point": "train", "who": "driver"}], "in_turn": false, "sabotage": "" or "truncate"}

Who is the driver, or with `which` one of several: a replica, a rank. Nobody is killed where it is the "disk", which is
full from there on: for driver and ranks no file may grow beyond `bytes`, or a `ballast` leaves so many free.
Steps are counted from 0. Points are the stages, each struck as it begins, and `POINTS` and `INSIDE` between them. With
`in_turn` only the first kill is due, at its point of its step or of a later one, and only while its victim lives. A
process that does not end within `limit_s` says where it hangs, and ends with 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import forerun.cli
from forerun.events import Began, Ended, Progress
from forerun.learner.distributed import LearnerGroup
from forerun.report.console import Console
from forerun.tracking.run_folder import RunFolder
from forerun.training import checkpoint, loop, prefetch, rollout
from forerun.training import run as runs
from forerun.training.state import Run
from forerun.types import STAGES
from fork_server import IMPORTS, ForkServer

POINTS = (*STAGES, "rollouts", "learnt", "checkpoint", "writing", "flushing", "renamed", "finishing")
INSIDE = ("scoring", "training", "evaluation", "sharding", "restoring")  # the last two: ranks save, and load
SAMPLES = 5  # "rollouts" is struck when so many have come
LIMIT_S = 300  # of one life, unless it is given


class Hand:
    """Strikes at the points of a plan, each once, and writes down what it struck."""

    def __init__(self, kills: list[dict[str, Any]], struck: str, in_turn: bool = False) -> None:
        self.kills, self.struck, self.in_turn, self.step = list(kills), struck, in_turn, 0
        self.run: Any = None
        self.learner: Any = None
        self.stage = ""

    def at(self, point: str) -> None:
        """This is the point: kill whom the plan names here."""
        for kill in self._due(point):
            if kill["who"] == "disk":
                self._note(kill, 0)
                self._fill(kill["bytes"], kill.get("ballast"))
                continue
            pid = self._victim(kill)
            if self.in_turn and not alive(pid):
                continue  # lost already, and not missed yet
            self._note(kill, pid)
            os.kill(pid, signal.SIGKILL)
            while self.in_turn and alive(pid):
                time.sleep(0.001)

    def _due(self, point: str) -> list[dict[str, Any]]:
        if self.in_turn:
            return [k for k in self.kills[:1] if k["point"] == point and self.step >= k["step"]]
        return [k for k in self.kills if (k["step"], k["point"]) == (self.step, point)]

    def _victim(self, kill: dict[str, Any]) -> int:
        if kill["who"] == "driver":
            return os.getpid()
        pids = self.run.engine.pids if kill["who"] == "replica" else self.learner.pids
        return int(pids[kill.get("which", 0)])

    def _note(self, kill: dict[str, Any], pid: int) -> None:
        self.kills.remove(kill)
        with open(self.struck, "a") as file:
            file.write(json.dumps({**kill, "pid": pid, "title": title(pid), "at": self.step}) + "\n")

    def _fill(self, size: int, ballast: str | None) -> None:
        if ballast is None:
            for pid in [os.getpid(), *getattr(self.learner, "pids", [])]:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
            return
        disk = os.statvfs(Path(ballast).parent)
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - size)

    def arm(self) -> None:
        """Put the hand into the loop, which knows nothing of it."""
        self._arm_steps()
        self._arm_checkpoints()
        self._arm_ranks()
        self._arm_generation()
        show = Console.show

        def struck(console: Any, event: Any) -> None:
            match event:
                case Began(name) if name in STAGES:
                    self.at(name)
                    self.stage = name
                case Ended(name) if name in STAGES:
                    self.stage = ""
                    if name == "train":
                        self.at("learnt")
                case Progress(done=done) if self.stage in ("logprob", "train") and done > 0:
                    self.at("scoring" if self.stage == "logprob" else "training")
            show(console, event)

        Console.show = struck  # type: ignore[method-assign]

    def _arm_generation(self) -> None:
        generate = rollout.generate

        def counted(*arguments: Any) -> Any:
            work = generate(*arguments)
            while True:
                try:
                    event = next(work)
                except StopIteration as end:
                    return end.value
                if self.stage == "generation" and event.done == SAMPLES:
                    self.at("rollouts")
                yield event

        rollout.generate = prefetch.generate = counted

    def _arm_steps(self) -> None:
        evaluate, finish_run = loop.evaluate, runs.finish_run

        def entered(original: Any) -> Any:
            def following(source: Any, step: int, clock: Any) -> Any:
                self._enter(source.run, step)
                return original(source, step, clock)

            return following

        def evaluation(run: Any, done: int) -> Any:
            self._enter(run, done - 1)
            self.at("evaluation")
            return evaluate(run, done)

        def finishing(run: Any, *more: Any) -> Any:
            self._enter(run, run.history.step - 1)  # also where no step was left
            self.at("finishing")
            return finish_run(run, *more)

        loop.evaluate, runs.finish_run = evaluation, finishing
        for source in (rollout.SynchronousSource, prefetch.AsynchronousSource):
            source.next = entered(source.next)  # type: ignore[attr-defined]

    def _enter(self, run: Any, step: int) -> None:
        self.step, self.run, self.learner, self.stage = step, run, run.learner, ""

    def _arm_ranks(self) -> None:
        save, restore = LearnerGroup.save, LearnerGroup.restore

        def saving(group: Any, folder: Path) -> None:
            self.at("sharding")
            save(group, folder)

        def restoring(group: Any, folder: Path) -> None:
            self.learner, self.step = group, max(0, self.step)
            self.at("restoring")
            restore(group, folder)

        LearnerGroup.save = saving  # type: ignore[method-assign]
        LearnerGroup.restore = restoring  # type: ignore[method-assign]

    def _arm_checkpoints(self) -> None:
        write, flush, save, place = (
            Run._checkpoint, checkpoint._flush, torch.save, checkpoint._put_in_place,
        )  # fmt: skip

        def begun(run: Any) -> Any:
            self.at("checkpoint")
            return write(run)

        def half(state: Any, path: Any, **settings: Any) -> None:
            save(state, path, **settings)
            if not isinstance(path, Path):  # a drafter's training keeps its own state, and messages are pickled
                return
            kept = os.stat(path).st_size
            os.truncate(path, kept // 2)  # as far as it had come
            self.at("writing")
            os.truncate(path, kept)
            save(state, path)

        def flushed(folder: Any) -> None:
            self.at("flushing")
            flush(folder)

        def placed(scratch: Any, target: Any) -> None:
            place(scratch, target)
            self.at("renamed")

        Run._checkpoint = begun  # type: ignore[method-assign]
        checkpoint.torch.save = half
        checkpoint._flush, checkpoint._put_in_place = flushed, placed


def alive(pid: int) -> bool:
    """Whether a process can still be killed: a dead one that nobody has missed yet can not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def title(pid: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:  # no /proc, or no such process
        return ""


def live(request: dict[str, Any]) -> int:
    """One life, to its end or its death."""
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    forked = ForkServer(fresh=False).used() if request["forked"] else contextlib.nullcontext()
    faulthandler.dump_traceback_later(request.get("limit_s", LIMIT_S), exit=True)
    Hand(request["kills"], request["struck"], request.get("in_turn", False)).arm()
    if request.get("sabotage") == "truncate":
        RunFolder.truncate_after = lambda self, step: 0  # type: ignore[method-assign]
    sys.argv = ["forerun", *request["arguments"]]
    try:
        with forked:
            forerun.cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
    return 0


def main() -> None:
    """Until nothing more is asked."""
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(live(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
