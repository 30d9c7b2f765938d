"""The trace: whole for a viewer at any moment, one state at a time per engine, and continued without duplicates."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from forerun.errors import UserError
from forerun.tracking.timeline import BUSY, IN_FLIGHT, LEARNER, Event, Timeline, read_timeline
from timelines import write_steps


def parsed(path: Path) -> list[dict[str, Any]]:
    """As a viewer reads it: an array whose closing bracket may be missing."""
    text = path.read_text()
    return json.loads(text if text.endswith("]\n") else text + "]")


def overlaps(events: list[Event]) -> list[tuple[Event, Event]]:
    """Pairs of spans of one lane that share more than the rounding of their times (a nanosecond)."""
    found = []
    for lane in {e.lane for e in events}:
        spans = sorted((e for e in events if e.lane == lane and e.seconds is not None), key=lambda e: e.start_s)
        found += [(a, b) for a, b in pairwise(spans) if b.start_s < a.start_s + (a.seconds or 0) - 2e-9]
    return found


def test_the_file_is_whole_after_every_flush_and_closed_at_the_end(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "t.json")
    sizes = []
    for step in range(1, 4):
        write_steps(timeline, range(step, step + 1))
        sizes.append(len(parsed(timeline.path)))
    before = timeline.path.read_text()
    timeline.close()
    assert timeline.path.read_text() == before + "]\n" and json.loads(before + "]") == parsed(timeline.path)
    events = parsed(timeline.path)
    names = {(e["ph"], e["name"]) for e in events}
    assert {("M", "process_name"), ("M", "thread_name"), ("X", "load"), ("X", "idle"), ("C", IN_FLIGHT)} <= names
    assert all({"ph", "pid", "tid", "name"} <= set(e) for e in events)
    assert all(e["ts"] >= 0 and e["dur"] > 0 for e in events if e["ph"] == "X")
    assert sizes[2] - sizes[1] == 4 + 1 + 14 + 1  # two spans each, the idle state between, 14 counts of 40 and a zero


def test_a_span_is_measured_once(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "t.json")
    with pytest.raises(ValueError), timeline.span(LEARNER, "train", 1) as span:
        time.sleep(0.01)
        raise ValueError
    timeline.flush()
    (event,) = read_timeline(timeline.path)[0]
    assert event.seconds == pytest.approx(span.seconds, abs=1e-9) and span.seconds >= 0.01


def test_states_of_an_engine_do_not_overlap_whoever_writes(tmp_path: Path) -> None:
    """Three threads push one engine from state to state; a fourth writes the file meanwhile."""
    timeline = Timeline(tmp_path / "t.json")

    def push(seed: int) -> None:
        for i in range(200):
            timeline.engine("engine").enter(("load", "generate", "idle")[(i + seed) % 3], i % 5, i)
            timeline.mark("engine", "lost", 1)

    threads = [threading.Thread(target=push, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        timeline.flush()
    timeline.close()
    events, broken = read_timeline(timeline.path)
    assert broken == 0 and sum(e.seconds is None for e in events) == 600
    assert overlaps(events) == [] and sum(e.name in BUSY for e in events) > 200
    longer = [Event(e.lane, e.name, e.start_s, e.seconds and e.seconds + 1e-6, e.step) for e in events]
    assert len(overlaps(longer)) > 100  # what finds nothing would find a microsecond


def test_idle_seconds_are_those_of_the_windows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline, clock_s = Timeline(tmp_path / "t.json"), [0.0]
    monkeypatch.setattr(timeline, "now_ns", lambda: round(clock_s[0] * 1e9))
    busy, never = timeline.engine("replica 0"), timeline.engine("replica 1")
    for at, state in ((1.0, "generate"), (3.0, "idle"), (4.0, "load"), (5.0, "start"), (7.0, "generate")):
        clock_s[0] = at
        busy.enter(state, 1)
    clock_s[0] = 8.0

    def idle_s(*windows: tuple[float, float]) -> float:
        return timeline.engine_idle_s([(round(a * 1e9), round(b * 1e9)) for a, b in windows])

    assert idle_s((0.0, 2.0), (2.5, 4.5)) == pytest.approx((2.0 + 4.0) / 2)  # one was busy for 1 + 0.5 + 0.5 of 4
    assert idle_s((4.5, 6.0)) == pytest.approx((1.0 + 1.5) / 2)  # a starting engine does nothing
    assert idle_s((6.0, 8.0)) == pytest.approx((1.0 + 2.0) / 2)  # what it does now counts too
    never.enter("evaluate", 2)
    clock_s[0] = 10.0
    assert idle_s((8.0, 10.0)) == pytest.approx(0.0)
    timeline.flush()
    written = [(e.name, e.start_s, e.seconds) for e in read_timeline(timeline.path)[0] if e.lane == "replica 0"]
    assert written == [("idle", 0, 1), ("generate", 1, 2), ("idle", 3, 1), ("load", 4, 1), ("start", 5, 2)]


def test_a_run_that_goes_on_drops_later_steps_and_its_clock_does_too(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    timeline = Timeline(path)
    write_steps(timeline, range(1, 5))
    killed = path.read_text()
    path.write_text(killed[: killed.rindex('"ts"') + 9])  # in the middle of a line
    assert read_timeline(path)[1] == 1
    whole = [e for e in read_timeline(path)[0] if e.step <= 2]
    resumed = Timeline(path, clock_s=0.0, step=2)
    kept, broken = read_timeline(path)
    assert (kept, broken) == (whole, 0) and {e.step for e in kept} == {1, 2}
    end_s = max(e.start_s + (e.seconds or 0) for e in kept)
    assert resumed.now_ns() / 1e9 >= end_s
    write_steps(resumed, range(3, 5))
    resumed.close()
    events = read_timeline(path)[0]
    trained = [e for e in events if e.name == "train"]
    assert [e.step for e in trained] == [1, 2, 3, 4] and overlaps(events) == []
    assert trained[2].start_s >= end_s and {e.lane for e in events} == {LEARNER, "engine"}
    assert len([e for e in parsed(path) if e["ph"] == "M"]) == 4  # two processes and two lanes, each named once
    late = Timeline(path, clock_s=1000.0, step=4)
    assert late.now_ns() / 1e9 >= 1000.0


def test_a_run_from_before_its_first_step_keeps_nothing(tmp_path: Path) -> None:
    write_steps(Timeline(tmp_path / "t.json"), range(1, 3))
    again = Timeline(tmp_path / "t.json", step=0)
    write_steps(again, range(1, 2))
    assert [e.step for e in read_timeline(again.path)[0] if e.name == "train"] == [1]
    assert parsed(again.path)[0]["name"] == "process_name"


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "gone" / "t.json")
    with pytest.raises(UserError, match=r"t\.json"):
        timeline.close()
