"""What tests of killed runs share: lives of a driver, and what the logs of a run have to account for."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from forerun.tasks import load_task
from forerun.training.prompts import problems_of_step
from forerun.training.run import resumed_recipe
from kill_driver import LIMIT_S

PROMPTS, SAMPLES = 3, 4


def write_recipe(folder: Path, model: Path, **blocks: dict[str, Any]) -> Path:
    """Sums for a tiny model, with a drafter that is trained before step 1; `blocks` add to the settings."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data: dict[str, Any] = {
        "name": "kills",
        "runs": str(folder / "runs"),
        "policy": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(folder / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "eagle3", "k": 3},
        "draft": {"rollouts": 16, "epochs": 1, "depth": 2, "vocab": 30},
        "rollout": {"slots": 1, "max_new_tokens": 10},
        "train": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "learning_rate": 1e-3},
        "eval": {"every": 4, "prompts": 2},
        "checkpoint": {"every": 1},
    }
    for name, block in blocks.items():
        data[name] = data[name] | block
    path = folder / "kills.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


class Zygote:
    """`kill_driver.py`, waiting to be asked. All that comes of it carries its mark and keeps to its folder."""

    def __init__(
        self, folder: Path, forked: bool = False, prefix: Sequence[str] = (), limit_s: float = LIMIT_S
    ) -> None:
        """`forked`: replicas and ranks come from a fork server. `prefix`: of its command.

        `limit_s`: of a life.
        """
        self.folder, self.forked, self.limit_s = folder, forked, limit_s
        (folder / "tmp").mkdir()
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), "KILL_TESTS_IN": str(folder)}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__).parent / "kill_driver.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | own,
        )  # fmt: skip

    def live(
        self, arguments: list[str], kills: list[dict[str, Any]] | None = None, sabotage: str = "", in_turn: bool = False
    ) -> int:
        """One life of a driver; its exit code, or minus the signal."""
        request = {
            "arguments": arguments, "kills": kills or [], "in_turn": in_turn, "sabotage": sabotage,
            "forked": self.forked,
            "out": str(self.folder / "out.txt"), "struck": str(self.folder / "struck.jsonl"),
            "limit_s": self.limit_s,
        }  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit_s + 60)
        assert ready, f"the driver hangs: {self.said}"
        return int(json.loads(self.process.stdout.readline())["code"])

    def lives(self, recipe: Path, arguments: list[str], plans: list[list[dict[str, Any]]], sabotage: str = "") -> Path:
        """Start a run and resume it until it ends: life i has the kills of plan i, the last one of which is its own."""
        for number, plan in enumerate([*plans, []]):
            code = self.live(beginning(recipe, arguments, number), plan, sabotage)
            assert code == (-9 if plan else 0), f"life {number} with {plan} ended with {code}: {self.said}"
        return latest(recipe)

    def lives_in_turn(self, recipe: Path, arguments: list[str], plan: list[dict[str, Any]]) -> Path:
        """The same with one plan for all lives, whose kills come one after another."""
        number = 0
        while True:
            code = self.live(beginning(recipe, arguments, number), plan[len(self.struck) :], in_turn=True)
            if code == 0:
                return latest(recipe)
            last = self.struck[-1:]
            assert code == -9 and last and last[0]["who"] == "driver", f"{last} ended with {code}: {self.said}"
            number += 1

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        finally:
            self.process.kill()

    @property
    def said(self) -> str:
        """By the latest life."""
        return (self.folder / "out.txt").read_text()

    @property
    def struck(self) -> list[dict[str, Any]]:
        """The kills that were carried out, in order."""
        path = self.folder / "struck.jsonl"
        return lines(path) if path.exists() else []

    def marked(self) -> set[int]:
        """Process ids of all that lives and comes of it, itself included."""
        return marked(f"KILL_TESTS_IN={self.folder}")

    def wait_until_alone(self, seconds: float = 30.0) -> None:
        """Nothing outlives its driver by so much."""
        until = time.monotonic() + seconds
        while (found := self.marked()) != {self.process.pid}:
            assert time.monotonic() < until, f"{found} are there; {self.process.pid} should be alone"
            time.sleep(0.1)


def marked(mark: str) -> set[int]:
    """Process ids of all that live with this in their environment."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                found.add(int(place.name))
        except OSError:
            continue  # somebody else's, or gone
    return found


def beginning(recipe: Path, arguments: list[str], number: int) -> list[str]:
    """The command line of a run's first life, or of a later one."""
    if number == 0:
        return ["train", str(recipe), *arguments]
    return ["train", "--resume", str(recipe.parent / "runs" / "latest")]


def latest(recipe: Path) -> Path:
    """The newest run of a recipe."""
    return (recipe.parent / "runs" / "latest").resolve()


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
        chosen = problems_of_step(task.problems("train"), step, recipe.train.prompts_per_step, recipe.seed)
        for place, problem in enumerate(chosen):
            expected[step + 1, f"{step + 1}/{place}", problem.question] += recipe.train.samples_per_prompt
    counted = Counter((s["step"], s["prompt_id"], s["prompt"][len("<u>") : -len("<a>")]) for s in samples)
    wrong += [f"{key}: {expected[key]} expected, {counted[key]} found" for key in expected.keys() | counted.keys()
              if expected[key] != counted[key]]  # fmt: skip
    return wrong
