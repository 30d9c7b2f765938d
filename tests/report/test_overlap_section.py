"""The page's figures of learner and engines side by side, from timeline and metrics of a run."""

from __future__ import annotations

import pytest

from forerun.report import plots
from forerun.report.run_page import write_report
from forerun.tracking.reader import load_run
from forerun.tracking.run_folder import RunFolder
from forerun.tracking.timeline import Timeline, read_timeline
from timelines import write_steps


def test_the_page_draws_the_last_steps(run: RunFolder) -> None:
    timeline = Timeline(run.timeline)
    write_steps(timeline, range(1, 8))
    timeline.engine("engine").enter("start", 7)
    timeline.mark("engine", "lost", 7)
    drawn = plots.gantt(load_run(run.path))
    assert drawn is not None
    bars = {trace["name"]: trace for trace in drawn["data"]}
    assert bars["trains"]["text"] == ["4", "5", "6", "7"] and set(bars["generates"]["y"]) == {"engine"}
    assert bars["weights"]["y"] == ["engine"] * 4 and "evaluation" not in bars
    start, end = drawn["layout"]["xaxis.range"]
    trained = bars["trains"]
    assert start <= trained["base"][0] and trained["base"][-1] + trained["x"][-1] == pytest.approx(end)
    assert bars["generates"]["customdata"][0].startswith("step 4, version 3: 0.00")


def test_a_torn_timeline_is_named_and_its_rest_drawn(run: RunFolder) -> None:
    write_steps(Timeline(run.timeline), range(1, 4))
    text = run.timeline.read_text()
    run.timeline.write_text(text[:-30])
    assert "timeline.json has 1 broken line, left out here." in load_run(run.path).missing
    page = write_report(run.path).read_text()
    assert "timeline.json has 1 broken line" in page and 'data-figure="gantt"' in page
    run.timeline.write_text('[{"ph": "X", "name": "train"}\n,3\n,{"ph": "Z", "tid": 1, "args": []}\nnonsense\n')
    assert read_timeline(run.timeline) == ([], 4)


def test_what_a_run_does_not_have_is_not_drawn(run: RunFolder) -> None:
    """A synchronous run has no queue and no lag; a run of an earlier version has no timeline either."""
    write_steps(Timeline(run.timeline), range(1, 4))
    for step in (1, 2, 3):
        run.log(step, {"time/exposed_generation": 12.5, "time/engine_idle": 15.0 + step})
    page = write_report(run.path).read_text()
    shown = [name for name in ("gantt", "idle", "queue", "lag") if f'data-figure="{name}"' in page]
    assert shown == ["gantt", "idle"]
    for step in (1, 2, 3):
        run.log(step, {"async/steps_waiting": 1, "async/lag_tokens_0": 30, "async/lag_tokens_1": 10 * step})
    run.timeline.unlink()
    page = write_report(run.path).read_text()
    shown = [name for name in ("gantt", "idle", "queue", "lag") if f'data-figure="{name}"' in page]
    assert shown == ["idle", "queue", "lag"]
    lag = plots.lag_bars(load_run(run.path))
    assert lag is not None and lag["data"][0]["y"] == pytest.approx([90 / 150, 60 / 150])
    run.summary.unlink()
    overlap = load_run(run.path).summary["overlap"]
    assert overlap == pytest.approx({"learner_idle": 12.5 / 30, "engine_idle": 17 / 30, "steps_waiting": 1})
    words = "Median step: learner idle 42%, engine idle 57%, steps waiting for the learner: 1."
    assert words in write_report(run.path).read_text()
