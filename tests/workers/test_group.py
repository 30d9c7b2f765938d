"""Ranks of this machine with a dummy served in them: requests to all, and which one is named when one is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dummy_worker
from forerun.errors import UserError
from forerun.events import finish
from forerun.workers.group import RankGroup, RanksLost
from forerun.workers.handle import NotPlaced, Spec, Timeouts, Worker
from forerun.workers.local import LocalLauncher

pytestmark = pytest.mark.usefixtures("forked_workers")
SHORT = Timeouts(heartbeat_s=3.0, start_s=60.0)


class Numbered(LocalLauncher):
    """Each worker's greeting is its number."""

    def start(self, count: int, spec: Spec) -> list[Worker]:
        each = [Spec(spec.factory, (str(n),), timeouts=spec.timeouts) for n in range(count)]
        return [LocalLauncher.start(self, 1, one)[0] for one in each]


class Full(LocalLauncher):
    """Has no room for the second worker."""

    def start(self, count: int, spec: Spec) -> list[Worker]:
        raise NotPlaced("was not placed", 1)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(dummy_worker.__file__).parent), prepend=os.pathsep)


@pytest.fixture
def group() -> Iterator[Callable[..., RankGroup]]:
    """group(greeting) -> two ranks; None: their numbers."""
    made = []

    def of(greeting: str | None = None, **settings: Any) -> RankGroup:
        launcher = Numbered() if greeting is None else LocalLauncher()
        spec = Spec("dummy_worker:serve_dummy", (greeting,), timeouts=SHORT)
        made.append(RankGroup("the test", launcher, 2, spec, **settings))
        return made[-1]

    yield of
    for each in made:
        each.close()


def test_all_answer_in_the_order_of_the_ranks(group: Callable[..., RankGroup]) -> None:
    ranks = group()
    answers = finish(ranks.run([("greet",)] * 2))
    assert [answer[1] for answer in answers] == ["0", "1"] and [answer[2] for answer in answers] == ranks.pids
    with pytest.raises(UserError, match="no such thing here"):
        ranks.ask("refuse")
    assert ranks.ask("greet") == ["0", "1"]  # they go on


def test_tensors_are_put_in_place(group: Callable[..., RankGroup]) -> None:
    ranks, target = group(), torch.zeros(10, 10)
    ranks.fetch("tensors", {"w": target})
    assert torch.equal(target.view(-1), torch.arange(100.0))
    with pytest.raises(RanksLost, match="Rank 0 of the test sent 1 parameters only in part: w; all 2 were ended"):
        ranks.fetch("tensors", {"w": torch.zeros(101)})


def test_progress_of_copies_counts_once(group: Callable[..., RankGroup]) -> None:
    for copies, last in ((1, 2 * 96), (2, 96)):  # the last piece of 16 begins at 96
        done = list(group("both", copies=copies).run([("tensors",)] * 2))
        assert done == sorted(done) and done[-1] == last


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("kill", "Rank 1 of the test was killed by signal 9; all 2 were ended"),
        ("fail", r"Rank 1 of the test ended with code 1: RuntimeError: it was asked to fail \(.*\); all 2 were ended"),
        ("exit", "Rank 1 of the test ended with code 3: the last line; all 2 were ended"),
        ("garbage", "Rank 1 of the test returned invalid output: .*; all 2 were ended"),
        ("hang", "Rank 1 of the test has been silent for 3 s; all 2 were ended"),
    ],
)
def test_the_rank_that_was_lost_first_is_named(group: Callable[..., RankGroup], request_: str, words: str) -> None:
    """The other one fails a second later, or not before the hanging one is missed."""
    ranks = group()
    if request_ == "hang":
        os.kill(ranks.pids[1], signal.SIGSTOP)
        request: tuple[Any, ...] = ("beat", 20, 0.2)
    else:
        request = ("only", 1, request_)
    with pytest.raises(RanksLost, match=f"^{words}$"):
        finish(ranks.run([request] * 2))
    assert all(not Path(f"/proc/{pid}").exists() for pid in ranks.pids)
    with pytest.raises(RanksLost, match="The ranks of the test were ended; start new ones"):
        ranks.ask("greet")


def test_ranks_that_cannot_start(group: Callable[..., RankGroup]) -> None:
    with pytest.raises(UserError, match="it refuses to start"):
        group("refuse")
    with pytest.raises(
        RanksLost, match=r"Rank \d of the test ended with code 1: ValueError: it fails to start \(.*; all 2"
    ):
        group("fail")
    with pytest.raises(UserError, match="Rank 1 of the test was not placed"):
        RankGroup("the test", Full(), 2, Spec("dummy_worker:serve_dummy"))
