"""`forerun` in processes of its own that are killed, or lose a replica, at a named point of a named step.

A script that reads one JSON object per line, forks a process for it that runs the command line, and answers with one
line: {"code": exit code, or minus the signal}. The libraries are loaded once, before the first fork.

    {"words": ["train", "--resume", "runs/latest"], "out": file, "struck": file,
     "kills": [{"step": 2, "point": "train", "who": "driver" or "replica"}], "sabotage": "" or "truncate"}

Steps are counted from 0. Points are the stages, each struck as it begins, and `POINTS` between them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import forerun.cli
from forerun.learner import checkpoint
from forerun.loop import loop
from forerun.report.console import Console
from forerun.report.metrics import RunFolder

STAGES = ("data", "prepare", "generation", "logprob", "train")
POINTS = (*STAGES, "rollouts", "learnt", "checkpoint", "writing", "flushing", "renamed", "finishing")
SAMPLES = 5  # "rollouts" is struck when so many have come


class Hand:
    """Strikes at the points of a plan, each once, and writes down what it struck."""

    def __init__(self, kills: list[dict[str, Any]], struck: str) -> None:
        self.kills, self.struck, self.step = list(kills), struck, 0
        self.training: Any = None

    def at(self, point: str) -> None:
        """This is the point: kill whom the plan names here."""
        for kill in [k for k in self.kills if (k["step"], k["point"]) == (self.step, point)]:
            self.kills.remove(kill)
            pids = list(getattr(self.training.engine, "pids", []))
            with open(self.struck, "a") as file:
                file.write(json.dumps({**kill, "replicas": pids}) + "\n")
            os.kill(os.getpid() if kill["who"] == "driver" else pids[0], signal.SIGKILL)

    def arm(self) -> None:
        """Put the hand into the loop, which knows nothing of it."""
        self._arm_steps()
        self._arm_checkpoints()
        stage, progress = loop.StageTimer.stage, Console.progress

        @contextmanager
        def struck(timer: Any, name: str) -> Iterator[None]:
            self.at(name)
            with stage(timer, name):
                yield
            if name == "train":
                self.at("learnt")

        def counted(console: Any, done: float, total: float, unit: str, rate: float | None = None) -> None:
            if done == SAMPLES and rate is not None:
                self.at("rollouts")
            progress(console, done, total, unit, rate)

        loop.StageTimer.stage = struck  # type: ignore[method-assign, assignment]
        Console.progress = counted  # type: ignore[method-assign]

    def _arm_steps(self) -> None:
        original, finish = loop.Training._step, loop.Training._finish

        def step(training: Any, number: int, stop: Any) -> None:
            self.step, self.training = number, training
            original(training, number, stop)

        def finishing(training: Any) -> Any:
            self.step, self.training = training.history.step - 1, training  # also where no step was left
            self.at("finishing")
            return finish(training)

        loop.Training._step = step  # type: ignore[method-assign]
        loop.Training._finish = finishing  # type: ignore[method-assign]

    def _arm_checkpoints(self) -> None:
        write, flush, save, place = (
            loop.Training._checkpoint, checkpoint._flush, torch.save, checkpoint._put_in_place,
        )  # fmt: skip

        def begun(training: Any) -> None:
            self.at("checkpoint")
            write(training)

        def half(state: Any, path: Any) -> None:
            save(state, path)
            if not isinstance(path, Path):  # a drafter's training keeps its own state
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

        loop.Training._checkpoint = begun  # type: ignore[method-assign]
        checkpoint.torch.save = half
        checkpoint._flush, checkpoint._put_in_place = flushed, placed


def live(order: dict[str, Any]) -> int:
    """One life, to its end or its death."""
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    Hand(order["kills"], order["struck"]).arm()
    if order.get("sabotage") == "truncate":
        RunFolder.truncate_after = lambda self, step: 0  # type: ignore[method-assign]
    sys.argv = ["forerun", *order["words"]]
    try:
        forerun.cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
    return 0


def main() -> None:
    """Until nothing more is asked."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(live(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
