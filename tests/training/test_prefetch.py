"""Generation ahead of learning: never older than the lag allows, never more than fits; failures reach the learner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from forerun.engine import Counters, Sampling, Weights
from forerun.errors import Interrupted, UserError
from forerun.training.prefetch import RolloutThread, lag_metrics
from forerun.training.prompts import Request
from forerun.training.rollout import RolloutBatch
from forerun.types import Rollout

STEPS = 6


class Recorder:
    """In the place of an engine: knows which version it holds."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def load(self, weights: Weights) -> Weights:
        self.versions.append(weights.version)
        return weights


def generated(versions: list[int]) -> RolloutBatch:
    rollout = Rollout([1], [2] * len(versions), [-1.0] * len(versions), versions, "eos")
    return RolloutBatch([rollout], ["x"], torch.ones(1, 1), 0.1, 0.0, Counters(), [], Request([], [], Sampling()))


def ahead(
    engine: Recorder, lag: int, rounds: int = 4, in_flight: bool = False, gate: threading.Event | None = None
) -> RolloutThread:
    """Every step has `rounds` tokens, each of the version that the engine then holds."""

    def make(step: int, stop: Callable[[], bool], between: Callable[[], None]) -> RolloutBatch:
        versions = []
        for number in range(rounds):
            between()
            if stop():
                raise Interrupted
            versions.append(engine.versions[-1])
            if gate is not None and number == rounds // 2:
                gate.wait(10)
        return generated(versions)

    return RolloutThread(engine, make, range(STEPS), lag, in_flight)  # type: ignore[arg-type]


def version(number: int) -> Weights:
    return Weights(number, {})


def settle(source: RolloutThread, waiting: int) -> None:
    """Until that many steps wait; and a moment longer, so that one too many would show."""
    end = time.monotonic() + 10
    while source.waiting < waiting:
        assert time.monotonic() < end, source.waiting
        time.sleep(0.01)
    time.sleep(0.1)


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_no_more_is_generated_than_the_lag_allows_and_nothing_older_is_trained_on(lag: int) -> None:
    engine = Recorder()
    source = ahead(engine, lag)
    time.sleep(0.1)
    assert source.waiting == 0  # nothing was published
    source.offer(version(0))
    for step in range(STEPS):
        settle(source, min(lag + 1, STEPS - step))
        assert source.waiting == min(lag + 1, STEPS - step)
        lags = lag_metrics(source.take(step, lambda: False), step)
        assert lags["async/lag_max"] == min(step, lag) and lags["async/mixed_rollouts"] == 0
        source.offer(version(step + 1))
    source.close()
    assert engine.versions == sorted(set(engine.versions))


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_new_version_takes_over_in_flight_only_if_asked_to(in_flight: bool) -> None:
    gate = threading.Event()
    source = ahead(Recorder(), 1, in_flight=in_flight, gate=gate)
    source.offer(version(0))
    time.sleep(0.1)  # step 0 waits in its third round
    source.offer(version(1))
    gate.set()
    found = source.take(0, lambda: False).rollouts[0].versions
    assert found == ([0, 0, 0, 1] if in_flight else [0, 0, 0, 0])
    source.close()


def test_a_failure_reaches_the_learner() -> None:
    def make(step: int, *_: Any) -> RolloutBatch:
        if step == 1:
            raise UserError("the engine is gone")
        return generated([0])

    source = RolloutThread(Recorder(), make, range(STEPS), 2, False)  # type: ignore[arg-type]
    source.offer(version(0))
    assert source.take(0, lambda: False).rollouts
    with pytest.raises(UserError, match="the engine is gone"):
        source.take(1, lambda: False)
    source.close()


def test_waiting_can_be_interrupted_and_closing_ends_the_thread() -> None:
    source = ahead(Recorder(), 1)
    with pytest.raises(Interrupted):
        source.take(0, lambda: True)
    started = time.monotonic()
    source.close()
    assert time.monotonic() - started < 5 and "rollouts" not in [t.name for t in threading.enumerate()]
