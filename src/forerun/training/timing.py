"""Who was busy with what: the learner's stages and the engine's states, on the run's `Timeline`.

One clock reading feeds the trace and the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar

from forerun.engine import RolloutEngine
from forerun.events import Began, Ended, EventStream
from forerun.tracking.timeline import IN_FLIGHT, LEARNER, Timeline, Window
from forerun.types import STAGES

T = TypeVar("T")


class StageClock:
    """Seconds of each stage of a step (counted from 1), and when they were."""

    def __init__(self, timeline: Timeline, step: int) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._windows: list[Window] = []
        self._timeline = timeline
        self._step = step

    def time_stage(self, stage: str, work: EventStream[T]) -> EventStream[T]:
        """Run `work` as a stage; its events go on to the caller."""
        yield Began(stage)
        with self._stage(stage):
            result = yield from work
        yield Ended(stage)
        return result

    def time_call(self, stage: str, function: Callable[[], T]) -> EventStream[T]:
        """Call a function as a stage."""
        yield Began(stage)
        with self._stage(stage):
            result = function()
        yield Ended(stage)
        return result

    def metrics(self) -> dict[str, float]:
        """Seconds by stage, and of the whole step."""
        return {f"time/{stage}": seconds for stage, seconds in self.seconds.items()} | {
            "time/step": sum(self.seconds.values()),
            "time/exposed_generation": self.seconds["generation"],
            "time/engine_idle": self.engine_idle_s,
        }

    @cached_property
    def engine_idle_s(self) -> float:
        """Seconds of these stages in which the engine waited, see `Timeline.engine_idle_s`; asked when all are over."""
        return self._timeline.engine_idle_s(self._windows)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with self._timeline.span(LEARNER, name, self._step) as span:
            yield
        self.seconds[name] += span.seconds
        self._windows.append((span.start_ns, span.end_ns))


class EngineStates:
    """Writes to the timeline what an engine does, or each of its replicas."""

    def __init__(self, engine: RolloutEngine, timeline: Timeline) -> None:
        engine.on_state = self.enter
        self._timeline = timeline
        self._work = "generate"
        self._step = 0
        self._began_ns = 0

    def begin(self, work: str, step: int) -> None:
        """What the next stream is for: "generate" or "evaluate", and whose step (counted from 1)."""
        self._work = work
        self._step = step
        self._began_ns = self._timeline.now_ns()

    def end(self, unfinished: Sequence[tuple[float, int]]) -> None:
        """The stream has ended; `unfinished` samples by seconds since it began."""
        self._timeline.counts(IN_FLIGHT, self._began_ns, unfinished, self._step)

    def enter(self, who: str, state: str, version: int) -> None:
        """`who` does this from now on. "lost" is an instant, after which its successor starts."""
        lane = self._timeline.engine(who)
        if state == "load":  # a load belongs to the step that its version is the newest for
            self._step = max(self._step, version + 1)
            lane.enter("load", version + 1, version)
        elif state == "generate":
            lane.enter(self._work, self._step, version)
        elif state == "lost":
            self._timeline.mark(who, "lost", self._step)
            lane.enter("start", self._step)
        else:
            lane.enter("idle", self._step)
