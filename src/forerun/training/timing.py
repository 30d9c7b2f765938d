"""Who was busy with what: the learner's stages and the engine's states, on the run's `Timeline`.

One clock reading feeds the trace and the metrics. A replicated engine reports the state of each replica
(`ReplicatedEngine.watch`); one in this process is watched from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar, cast

from forerun.engine import RolloutEngine, Sampling, Weights
from forerun.engine.base import Requests, nothing
from forerun.engine.replicated import ReplicatedEngine
from forerun.events import Began, Ended, Work
from forerun.tracking.timeline import IN_FLIGHT, LEARNER, Timeline, Window
from forerun.types import STAGES, Rollout

T = TypeVar("T")


class StageClock:
    """Seconds of each stage of a step (counted from 1), and when they were."""

    def __init__(self, timeline: Timeline, step: int) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._windows: list[Window] = []
        self._timeline = timeline
        self._step = step

    def timed(self, stage: str, work: Work[T]) -> Work[T]:
        """Run `work` as a stage; its events go on to the caller."""
        yield Began(stage)
        with self._stage(stage):
            result = yield from work
        yield Ended(stage)
        return result

    def call(self, stage: str, function: Callable[[], T]) -> Work[T]:
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


class WatchedEngine:
    """A rollout engine that leaves its states on a timeline; in everything else it is the engine within."""

    def __init__(self, within: RolloutEngine, timeline: Timeline) -> None:
        """Watch `within` from now on."""
        self._within, self._trace = within, timeline
        self._work, self._step, self._version = "generate", 0, 0
        self._own = None if isinstance(within, ReplicatedEngine) else timeline.engine("engine")
        if isinstance(within, ReplicatedEngine):
            within.watch = self._replica

    def __getattr__(self, name: str) -> Any:
        return getattr(self._within, name)

    @property
    def engine(self) -> RolloutEngine:
        """Itself, which `__getattr__` makes a `RolloutEngine`."""
        return cast("RolloutEngine", self)

    def begin(self, work: str, step: int) -> None:
        """What the next streams are for: "generate" or "evaluate", and whose step (counted from 1)."""
        self._work, self._step = work, step

    def load(self, weights: Weights) -> Weights:
        """See `RolloutEngine.load`. A load belongs to the step that its version is the newest for."""
        self._version, self._step = weights.version, max(self._step, weights.version + 1)
        if self._own is None:
            return self._within.load(weights)
        self._own.enter("load", weights.version + 1, weights.version)
        try:
            return self._within.load(weights)
        finally:
            self._own.enter("idle", self._step)

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        """See `RolloutEngine.stream`."""
        step, since_ns = self._step, self._trace.now_ns()
        if self._own is not None:
            self._own.enter(self._work, step, self._version)
        try:
            yield from self._within.stream(prompts, sampling, n, only, between)
        finally:
            if self._own is not None:
                self._own.enter("idle", step)
            self._trace.counts(IN_FLIGHT, since_ns, self._within.timeline, step)

    def _replica(self, index: int, state: str, version: int) -> None:
        """What a replica does from now on; "lost" is an instant, and its successor starts."""
        lane = f"replica {index}"
        if state == "lost":
            self._trace.mark(lane, "lost", self._step)
            self._trace.engine(lane).enter("start", self._step)
        elif state == "load":
            self._trace.engine(lane).enter("load", version + 1, version)
        elif state == "generate":
            self._trace.engine(lane).enter(self._work, self._step, version)
        else:
            self._trace.engine(lane).enter("idle", self._step)
