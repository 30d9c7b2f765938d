"""Reward functions as a user would write them."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from typing import Any

from forerun.tasks import Completion, Problem


def has_digit(problem: Problem, completion: str) -> float:
    """1 when the completion starts with a digit."""
    return float(completion[:1].isdigit())


def variety(problem: Problem, completion: str) -> float:
    """Share of different characters: hardly ever the same for two samples of a prompt."""
    return len(set(completion)) / max(1, len(completion))


def raises(problem: Problem, completion: str) -> float:
    """A user's bug."""
    return 1 / 0


def length(problem: Problem, rollout: Completion) -> dict[str, float]:
    """Sees the rollout; named parts."""
    return {"tokens": float(rollout.token_count or 0), "cut": float(rollout.finish_reason == "length")}


def sees(problem: Problem, rollout: Completion) -> float:
    """1 when everything that the contract names is there."""
    whole = rollout.text_with_special_tokens
    return float(
        rollout.problem == problem and rollout.text == "5" and whole == "<s>5</s>" and rollout.tokens == [1, 5]
    )


def does(problem: Problem, completion: str) -> Any:
    """What the completion says: every way in which a reward may go wrong."""
    match completion:
        case "raise":
            raise KeyError("no such key")
        case "exit":
            sys.exit(3)
        case "hang":
            while True:
                pass
        case "power":
            return len(str(9 ** (9**9)))  # holds the interpreter's lock
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "die":
            os._exit(7)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "deep":
            return does(problem, completion)
        case "coroutine":
            return _later()
        case "print":
            print("a line of the reward")
        case "child":
            subprocess.run(["sleep", "1000"])
        case "session":
            subprocess.run(["sleep", f"1000.{os.getppid()}"], start_new_session=True)
        case "terminate":
            child = subprocess.Popen(["sleep", "1000"])
            child.terminate()
            return -float(child.wait())
        case "pool":
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return float(sum(pool.map(abs, [1, -1])))
        case "fork":
            if os.fork() == 0:
                sys.exit(1)
            time.sleep(0.1)
    odd = {
        "none": None,
        "list": [1.0],
        "word": "good",
        "nan": math.nan,
        "inf": -math.inf,
        "large": 1e39,
        "part": {"a": None},
    }
    return odd.get(completion, 0.5)


async def _later() -> float:
    return 1.0


def hangs(problem: Problem, completion: str) -> float:
    """Never returns."""
    print("a reward hangs", file=sys.stderr, flush=True)
    while True:
        time.sleep(1.0)


def last_does(problem: Problem, completion: str) -> Any:
    """What the completion says twice."""
    return does(problem, completion[len(completion) // 2 :])


def prints(problem: Problem, completion: str) -> float:
    """Writes to stdout."""
    print("a line of the reward")
    return 1.0


def hangs_at_times(problem: Problem, completion: str) -> float:
    """In about a quarter of all answers."""
    if zlib.crc32(completion.encode()) % 4 == 0:
        hangs(problem, completion)
    return 1.0
