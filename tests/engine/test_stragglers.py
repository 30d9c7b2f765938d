"""A replica that is slow is distinguished from one that is dead, and from one that had a long sample once."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import faulty_engines
from forerun.config import SpeculationConfig
from forerun.engine import Sampling
from forerun.engine.replicated import ReplicatedEngine
from forerun.engine.stragglers import STREAK, Stragglers
from forerun.models import load_policy
from forerun.workers.handle import Timeouts


def stream(stragglers: Stragglers, *seconds: float, tokens: int = 100) -> list[str]:
    """One stream in which replica i takes so many seconds for its two samples."""
    for replica, busy in enumerate(seconds):
        stragglers.decodes(replica, 1, 10.0)
        stragglers.decodes(replica, 1, 10.0 + busy / 2)
        stragglers.delivered(replica, tokens // 4)
        stragglers.decodes(replica, 0, 10.0 + busy)
        stragglers.delivered(replica, tokens - tokens // 4)
    return stragglers.report()


def test_the_slowest_is_compared_with_the_others() -> None:
    stragglers = Stragglers()
    assert stream(stragglers, 2.0, 2.0, 8.0, 4.0) == [] and stragglers.slowest_ratio == 4.0
    assert (
        stream(stragglers, 1.0, 3.0) == [] and stragglers.slowest_ratio == 3.0
    )  # two: against the other one, not their mean
    assert stream(stragglers, 5.0) == [] and stragglers.slowest_ratio == 1.0  # alone


def test_it_takes_a_streak_to_be_reported_and_is_reported_once() -> None:
    stragglers, warnings = Stragglers(), []
    for slow in [True, True, False, *[True] * (STREAK + 2), False, *[True] * STREAK]:
        warnings.append(stream(stragglers, 1.0, 3.0 if slow else 1.0, 1.0))
    assert [i for i, found in enumerate(warnings) if found] == [2 + STREAK, 5 + 2 * STREAK]
    assert warnings[2 + STREAK][0].startswith(
        "Replica 1 is alive but slow: 30 ms per token, 3.0 times the others' median"
    )


def test_a_successor_is_timed_from_its_own_beginning() -> None:
    stragglers = Stragglers()
    for replica, samples, at_s in [(0, 1, 0.0), (1, 1, 0.0), (0, 0, 1.0), (1, 1, 50.0)]:
        stragglers.decodes(replica, samples, at_s)
    stragglers.delivered(0, 10)
    stragglers.delivered(1, 10)
    stragglers.forget(1)
    stragglers.decodes(1, 1, 100.0)
    stragglers.decodes(1, 0, 101.0)
    stragglers.delivered(1, 10)
    stragglers.report()
    assert stragglers.slowest_ratio == 1.0


def test_one_that_has_fewer_samples_or_nothing_for_a_while_is_not_slow() -> None:
    """Eight samples of 100 tokens in 1 s against one of them in the same second, then a pause and another one."""
    stragglers = Stragglers()
    for replica, samples, at_s in [(0, 8, 0.0), (1, 1, 0.0), (0, 0, 1.0), (1, 0, 1.0), (1, 1, 9.0), (1, 0, 10.0)]:
        stragglers.decodes(replica, samples, at_s)
    stragglers.delivered(0, 800)
    stragglers.delivered(1, 200)
    assert stragglers.report() == [] and stragglers.slowest_ratio == 1.0


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_a_sleepy_replica_is_reported_and_not_replaced(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its streams take longer than the heartbeat timeout, but it sends heartbeats between its rounds."""
    monkeypatch.setenv("PYTHONPATH", str(Path(faulty_engines.__file__).parent), prepend=os.pathsep)
    monkeypatch.setenv("FORERUN_TEST_SLEEPY", str(tmp_path / "taken"))
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    engine = ReplicatedEngine(
        "local", policy, None, SpeculationConfig(), slots=4, replicas=2, timeouts=Timeouts(heartbeat_s=6.0),
        make="faulty_engines:slow_first",
    )  # fmt: skip
    with closing(engine):
        for _ in range(STREAK):
            found = list(engine.stream([[5, 6], [7, 8]], Sampling(12, ignore_eos=True), 2))
            assert len(found) == 4
        assert engine.metrics()["replicas"]["lost"] == 0 and engine.metrics()["replicas"]["slowest_ratio"] > 2
        assert len(engine.warnings) == 1 and "is alive but slow" in engine.warnings[0]
