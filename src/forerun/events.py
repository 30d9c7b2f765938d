"""What long work says while it goes on. It yields events and returns its result; a consumer (the console, say) shows
them, or `finish` throws them away:

    summary = follow(train(recipe), console)        # report/console.py
    policy = finish(prepare_policy(recipe, ...))
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Began:
    """A stage of the work begins. Stages may be nested."""

    stage: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The innermost stage has ended."""

    stage: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the present stage is."""

    done: float
    total: float  # 0: not known
    unit: str  # plural noun, e.g. "rollouts"
    rate: float | None = None  # units per second


@dataclass(frozen=True, slots=True)
class Note:
    """One line that the user should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned:
    """A line that must not be overlooked; the summary repeats it."""

    text: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """A training step has been made and written down; steps are counted from 1."""

    step: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Finished:
    """A run has ended; the content of its summary.json."""

    summary: Mapping[str, Any]


Event = Began | Ended | Progress | Note | Warned | StepDone | Finished
EventStream = Generator[Event, None, T]  # yields events and returns a T
CountStream = Generator[int, None, T]  # yields how many sequences are done so far, and returns a T


def finish(work: Generator[Any, None, T]) -> T:
    """Run a generator to its end and return its result; what it yields is thrown away."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def to_its_end(work: EventStream[T]) -> EventStream[T]:
    """`work`, which an exception that the consumer throws does not break off: it is raised when all is done."""
    thrown: BaseException | None = None
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            if thrown is not None:
                raise thrown from None
            return end.value  # type: ignore[no-any-return]
        try:
            yield event
        except GeneratorExit:
            raise
        except BaseException as error:
            thrown = thrown or error


def as_stage(stage: str, work: EventStream[T]) -> EventStream[T]:
    """`work` between `Began(stage)` and `Ended(stage)`."""
    yield Began(stage)
    result = yield from work
    yield Ended(stage)
    return result


def with_progress(work: CountStream[T], total: int, unit: str = "rollouts") -> EventStream[T]:
    """Work that yields how many `unit` are done, as `Progress`."""
    started = time.perf_counter()
    while True:
        try:
            done = next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        yield Progress(done, total, unit, done / max(time.perf_counter() - started, 1e-9))
