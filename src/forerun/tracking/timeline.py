"""The timeline of a run: `timeline.json`, a trace that chrome://tracing and ui.perfetto.dev open.

Trace Event Format as an array, one event per line with the comma before it; the file of a killed run lacks its closing
bracket at most. Times are microseconds of the run's clock, which stops between a kill and the resume. Every event
belongs to a step, counted from 1 (0: before the first). A replica's events carry the times at which messages arrived.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forerun.tracking.files import disk_errors, write_atomically

LEARNER = "learner"  # every other lane is an engine's
QUEUE = "steps waiting"  # counter
IN_FLIGHT = "samples in flight"  # counter
BUSY = ("load", "generate", "evaluate")  # states of an engine; the others: "idle", and "start" of a replacement
SHORTEST_IDLE_NS = 1_000_000  # a shorter idle state is not written
MOST_COUNTS = 16  # points of a counter that are written by one `counts`
Window = tuple[int, int]  # from, to in nanoseconds of the run's clock


@dataclass(slots=True)
class Span:
    """A stretch of time, in nanoseconds of the run's clock."""

    start_ns: int
    end_ns: int = 0

    @property
    def seconds(self) -> float:
        """Its length, once it has ended."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True, slots=True)
class Event:
    """A span or, without seconds, an instant, as read from a file."""

    lane: str
    name: str
    start_s: float
    seconds: float | None
    step: int
    version: int | None = None


class Timeline:
    """Records events from any thread; they reach the file with `flush`."""

    def __init__(self, path: Path, clock_s: float = 0.0, step: int = 0) -> None:
        """Begin a file, or continue one after `step`: events of later steps are dropped.

        Args:
            clock_s: the run's clock at the least; it continues after the last event that is kept.

        Raises:
            UserError: the file cannot be written.
        """
        self.path = path
        self._lock = threading.RLock()
        self._engines: dict[str, EngineStates] = {}
        kept = _cut(path, step)
        self._ids = {e["args"]["name"]: e["tid"] for e in kept if e["name"] == "thread_name"}
        self._empty, self._lines = not kept, [] if kept else [_process(1, LEARNER), _process(2, "rollouts")]
        past_ns = max([round(clock_s * 1e9), *(round(_end_us(event) * 1e3) for event in kept)])
        self._zero_ns = time.perf_counter_ns() - past_ns

    def now_ns(self) -> int:
        """The run's clock in nanoseconds."""
        return time.perf_counter_ns() - self._zero_ns

    @contextmanager
    def span(self, lane: str, name: str, step: int, version: int | None = None) -> Iterator[Span]:
        """One event for the time within, also when an exception ends it. Spans of one lane must not be nested."""
        span = Span(self.now_ns())
        try:
            yield span
        finally:
            span.end_ns = self.now_ns()
            self.add(lane, name, span, step, version)

    def learner_span(self, name: str, step: int) -> AbstractContextManager[Span]:
        """The same, in the learner's lane."""
        return self.span(LEARNER, name, step)

    def add(self, lane: str, name: str, span: Span, step: int, version: int | None = None) -> None:
        """One event for a span that has ended."""
        times = {"ts": span.start_ns / 1e3, "dur": (span.end_ns - span.start_ns) / 1e3}
        self._write(lane, {"ph": "X", "name": name, **times, "args": _args(step, version)})

    def mark(self, lane: str, name: str, step: int) -> None:
        """An instant."""
        self._write(lane, {"ph": "i", "s": "t", "name": name, "ts": self.now_ns() / 1e3, "args": _args(step)})

    def count(self, counter: str, value: float, step: int, at_ns: int | None = None) -> None:
        """The value of a counter from now on, or from `at_ns`."""
        at = self.now_ns() if at_ns is None else at_ns
        event = {"ph": "C", "name": counter, "ts": at / 1e3, "args": {counter: value}, "step": step}
        self._write(None, event)  # the arguments of a counter are its series, so the step is not among them

    def counts(self, counter: str, since_ns: int, points: Sequence[tuple[float, int]], step: int) -> None:
        """At most `MOST_COUNTS` of the points (seconds after `since_ns`, value), and 0 at the time of the last."""
        for seconds, value in points[:: -(-len(points) // MOST_COUNTS)] if points else ():
            self.count(counter, value, step, since_ns + round(seconds * 1e9))
        if points:
            self.count(counter, 0, step, since_ns + round(points[-1][0] * 1e9))

    def engine(self, lane: str) -> EngineStates:
        """The states of one rollout engine."""
        with self._lock:
            return self._engines.setdefault(lane, EngineStates(self, lane))

    def engine_idle_s(self, windows: Sequence[Window]) -> float:
        """Seconds of these windows in which an engine neither generated nor loaded weights; the mean over engines.

        Windows must be passed in the order of time: what lies before the end of the last one is forgotten.
        """
        with self._lock:
            engines = list(self._engines.values())
            busy_s = sum(engine.busy_ns(windows) for engine in engines) / 1e9
        return sum(end - start for start, end in windows) / 1e9 - busy_s / max(1, len(engines))

    def flush(self) -> None:
        """Append the new events in one write. Raises UserError when the disk is full."""
        with self._lock:
            lines, self._lines = self._lines, []
            text = "".join(("[" if self._empty and i == 0 else ",") + line + "\n" for i, line in enumerate(lines))
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(text)
            self._empty = self._empty and not lines

    def close(self) -> None:
        """Write the rest and close the array. States that have not ended are not written."""
        with self._lock:
            self.flush()
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("]\n")

    def _write(self, lane: str | None, event: dict[str, Any]) -> None:
        with self._lock:
            if lane is not None and lane not in self._ids:
                self._ids[lane] = len(self._ids) + 1
                name = {"ph": "M", "name": "thread_name", "args": {"name": lane}}
                self._lines.append(json.dumps(self._place(lane) | name))
            self._lines.append(json.dumps(self._place(lane) | event))

    def _place(self, lane: str | None) -> dict[str, int]:
        return {"pid": 1 if lane == LEARNER else 2, "tid": 0 if lane is None else self._ids[lane]}


class EngineStates:
    """The states of one rollout engine, one after another without gaps."""

    def __init__(self, timeline: Timeline, lane: str) -> None:
        """Starts idle."""
        self._timeline = timeline
        self._lane = lane
        self._state: tuple[str, int, int | None] = ("idle", 0, None)  # name, step, version
        self._since = timeline.now_ns()
        self._busy: list[Window] = []  # that later windows may overlap

    def enter(self, name: str, step: int, version: int | None = None) -> None:
        """End the present state, which becomes an event, and begin another; the same state goes on."""
        timeline = self._timeline
        entered = (name, step, version)
        with timeline._lock:
            if entered == self._state:
                return
            left = self._state
            span = Span(self._since, timeline.now_ns())
            self._state = entered
            self._since = span.end_ns
            if left[0] in BUSY:
                self._busy.append((span.start_ns, span.end_ns))
            elif span.end_ns - span.start_ns < SHORTEST_IDLE_NS:
                return
            timeline.add(self._lane, left[0], span, *left[1:])

    def busy_ns(self, windows: Sequence[Window]) -> int:
        """Time of these windows in a busy state, the present one included; see `Timeline.engine_idle_s`."""
        now = self._timeline.now_ns()
        busy = [*self._busy, (self._since, now)] if self._state[0] in BUSY else self._busy
        self._busy = [(start, end) for start, end in self._busy if end > windows[-1][1]]
        return sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in windows for b in busy)


def read_timeline(path: Path) -> tuple[list[Event], int]:
    """Spans and instants of a file, complete or not, and the number of broken lines."""
    events, broken = _read(path)
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = [
        Event(
            lanes.get(e["tid"], f"lane {e['tid']}"),
            e["name"],
            e["ts"] / 1e6,
            e["dur"] / 1e6 if e["ph"] == "X" else None,
            e["args"]["step"],
            e["args"].get("version"),
        )
        for e in events
        if e["ph"] in "Xi"
    ]
    return found, broken


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a file as JSON, and the number of broken lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.splitlines() if line not in ("]", "")]
    events = [event for line in lines if (event := _event(line)) is not None]
    return events, len(lines) - len(events)


def _event(line: str) -> dict[str, Any] | None:
    """The event of a line; None for a broken one."""
    try:
        event: dict[str, Any] = json.loads(line.lstrip("[,"))
        known = event["ph"] == "M" or (event["tid"] >= 0 and _step_of(event) >= 0 and _end_us(event) >= 0)
        return event if known and event["name"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the events of steps up to `step` in the file, its array open; returns them."""
    kept = [event for event in _read(path)[0] if event["ph"] == "M" or _step_of(event) <= step]
    if path.exists():
        write_atomically(path, "".join(f"{',' if i else '['}{json.dumps(event)}\n" for i, event in enumerate(kept)))
    return kept


def _step_of(event: dict[str, Any]) -> int:
    step: int = event["step"] if event["ph"] == "C" else event["args"]["step"]
    return step


def _end_us(event: dict[str, Any]) -> float:
    end: float = event.get("ts", 0.0) + (event["dur"] if event["ph"] == "X" else 0.0)
    return end


def _args(step: int, version: int | None = None) -> dict[str, int]:
    return {"step": step} if version is None else {"step": step, "version": version}


def _process(pid: int, name: str) -> str:
    return json.dumps({"pid": pid, "tid": 0, "ph": "M", "name": "process_name", "args": {"name": name}})
