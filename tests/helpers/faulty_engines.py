"""Engines for the replicas of tests, made in their processes: slow, refusing, crashing, with invalid output."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from forerun.engine import load
from forerun.engine.base import RolloutEngine, Weights
from forerun.errors import UserError
from forerun.types import Rollout


def slow(engine: str, **settings: Any) -> RolloutEngine:
    """The real engine with a pause before each round, so that something can happen to it."""
    return slowed(load(engine, **settings), 0.01)


def slowed(made: RolloutEngine, seconds: float) -> RolloutEngine:
    """Waits before each round."""
    original = made.stream

    def stream(prompts: Any, sampling: Any, n: int = 1, only: Any = None, between: Any = None) -> Iterator[Rollout]:
        def wait() -> None:
            time.sleep(seconds)
            between()

        return original(prompts, sampling, n, only, wait)

    made.stream = stream  # type: ignore[method-assign]
    return made


def invalid(engine: str, **settings: Any) -> RolloutEngine:
    """Spoils its third rollout, unless the file named in the environment says that this was done already."""
    made = load(engine, **settings)
    done, original = Path(os.environ["FORERUN_TEST_INVALID"]), made.stream

    def stream(*arguments: Any) -> Iterator[Rollout]:
        for count, rollout in enumerate(original(*arguments)):
            if count == 2 and not done.exists():
                done.touch()
                rollout = replace(rollout, tokens=[10**6, *rollout.tokens[1:]])
            yield rollout

    made.stream = stream  # type: ignore[method-assign, assignment]
    return made


def without_extend(engine: str, **settings: Any) -> RolloutEngine:
    """The real engine, as one from outside that knows nothing of `extend`."""
    made = load(engine, **settings)
    made.extend = lambda requests: False  # type: ignore[method-assign]
    return made


def crashing(engine: str, **settings: Any) -> RolloutEngine:
    """Fails whenever it shall generate."""
    made = load(engine, **settings)

    def stream(*arguments: Any) -> Iterator[Rollout]:
        raise RuntimeError("it was made to die")

    made.stream = stream  # type: ignore[method-assign, assignment]
    return made


def dying(engine: str, **settings: Any) -> RolloutEngine:
    """Its process ends without an exception whenever it shall generate."""
    made = load(engine, **settings)

    def stream(*arguments: Any) -> Iterator[Rollout]:
        os._exit(7)

    made.stream = stream  # type: ignore[method-assign, assignment]
    return made


def refusing(engine: str, **settings: Any) -> RolloutEngine:
    """Cannot be made."""
    raise UserError("no such engine for the test")


def refusing_with_its_files(engine: str, **settings: Any) -> RolloutEngine:
    """Cannot be made either, and lists the files it was given."""
    held = sorted(p.name for p in Path(settings["policy"]).iterdir())
    raise UserError(f"made from {settings['policy']} with {' '.join(held)}")


def slow_first(engine: str, **settings: Any) -> RolloutEngine:
    """The real engine; the first replica that is made sleeps before each round."""
    made = load(engine, **settings)
    try:
        Path(os.environ["FORERUN_TEST_SLEEPY"]).touch(exist_ok=False)
    except FileExistsError:
        return made
    return slowed(made, 0.6)


def refusing_weights(engine: str, **settings: Any) -> RolloutEngine:
    """Holds weights, and the first process that is given any refuses them."""
    from benchmarks.broadcast import holder

    made = holder(engine, **settings)
    original = made.load

    def load_unless(weights: Weights) -> Weights:
        try:
            Path(os.environ["FORERUN_TEST_REFUSED"]).touch(exist_ok=False)
        except FileExistsError:
            return original(weights)
        raise UserError("it refuses them")

    made.load = load_unless
    return made
