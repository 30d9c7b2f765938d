"""What is printed: the step line, the final table, stdout and stderr kept apart, a terminal given back."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from forerun.events import Began, Ended, EventStream, Finished, Note, Progress, StepDone, Warned, as_stage
from forerun.report.console import Console, follow
from forerun.report.format import duration, number
from forerun.report.lines import step_line
from forerun.report.summary import (
    comparison_rows,
    predicted_plain_step_s,
    stage_rows,
    verdict,
)

METRICS = {
    "reward/mean": 0.61,
    "length/mean": 58.0,
    "length/truncated": 0.03,
    "time/generation": 11.4,
    "perf/gen_tokens_per_s": 402.0,
    "spec/acceptance_length": 3.1,
    "spec/k_mean": 5.0,
    "time/logprob": 2.1,
    "time/train": 16.8,
    "time/step": 31.0,
    "policy/kl": 3e-4,
}


def read_all(master: int) -> str:
    """Everything that is written to a terminal until its other end is closed, which Linux tells by an error."""
    seen = b""
    with os.fdopen(master, "rb", buffering=0) as stream:
        while True:
            try:
                chunk = stream.read(4096)
            except OSError:
                chunk = b""
            if not chunk:
                return seen.decode()
            seen += chunk


def table_text(summary: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(3, out=out).table(summary)
    return out.getvalue()


def test_step_line_has_names_units_and_what_is_left() -> None:
    assert step_line(42, 200, METRICS, 0.59, 261.0) == (
        "step  42/200 | reward 0.61 +0.02 | len 58 (trunc 3%) | gen 11.4s 402 tok/s accept 3.1/6 | "
        "logprob 2.1s train 16.8s | 31.0s/step | kl 3e-4 | eta 4m21s"
    )


def test_step_line_leaves_out_what_is_missing() -> None:
    assert step_line(1, 2, {"reward/mean": 0.5, "length/mean": None}, None, None) == "step 1/2 | reward 0.50"


def test_lines_without_a_terminal_are_plain_text() -> None:
    out = io.StringIO()
    with Console(2, out=out) as console:
        for event in (Began("generation"), Progress(1, 2, "sequences", 3.0), Ended("generation")):
            console.show(event)
        console.step(1, METRICS)
        console.note("saved to [x]/policy")
    text = out.getvalue()
    assert text.splitlines()[1] == "saved to [x]/policy"
    assert len(text.splitlines()) == 2 and "\x1b" not in text and text.isascii()
    assert "eta 31s" in text


def test_warnings_are_loud_and_kept_once() -> None:
    out = io.StringIO()
    console = Console(2, out=out)
    console.warn("acceptance fell from 3.1 to 1.0")
    assert console.warn("acceptance fell from 3.1 to 1.0") == ["acceptance fell from 3.1 to 1.0"]
    assert out.getvalue().count("WARNING acceptance fell") == 2


def test_the_rule_in_force_is_named_not_the_one_that_was_asked_for(summary: dict[str, Any]) -> None:
    forced = {**summary, "in_force": {"engine": "vllm", "rule": "token"}}
    assert "eagle3, k = 3, token verification" in table_text(forced)


def test_table_holds_what_the_user_came_for(summary: dict[str, Any]) -> None:
    text = table_text(summary)
    for words in (
        "plain",
        "speculative",
        "ratio",
        "eagle3, k = 3, block verification",
        "1.60x",
        "2.90 of 4",
        "0.82 0.63 0.45",
        "step, s (plain: predicted)",
        "medians over 3 steps",
        "0.310 ± 0.030 to 0.520 ± 0.040 on 128 held-out prompts (+4.2 standard errors)",
        "WARNING acceptance fell",
        "runs/r/metrics.jsonl",
        "2m05s",
    ):
        assert words in " ".join(text.split()), words


def test_plain_step_is_predicted_from_the_compared_generations(summary: dict[str, Any]) -> None:
    assert predicted_plain_step_s(summary) == pytest.approx(30.0 - 12.5 + 20.0)
    row = next(row for row in comparison_rows(summary) if row.label.startswith("step"))
    assert (row.plain, row.speculative, row.ratio) == ("37.5", "30.0", "1.25x")


def test_stages_add_up_to_the_step(summary: dict[str, Any]) -> None:
    rows = stage_rows(summary)
    assert [row.name for row in rows] == ["data", "prepare", "generation", "logprob", "train", "other"]
    assert sum(row.seconds for row in rows) == pytest.approx(30.0)
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_a_slower_run_and_a_plain_run_say_so(summary: dict[str, Any]) -> None:
    assert "slower: 0.91x of plain speed" in verdict(summary | {"speedup_generation": 0.91})
    assert "without speculation" in verdict(summary | {"speculation": {"method": "none"}})
    assert "within two standard errors" in verdict(summary | {"reward_end": 0.33})
    assert "its speed-up is not known" in verdict(summary | {"speedup_generation": None, "compare": []})


@pytest.mark.parametrize(
    "summary_part", [{}, {"steps": 0}, {"speculation": None, "compare": None, "stage_seconds": {}}]
)
def test_a_partial_summary_still_prints(summary_part: dict[str, Any]) -> None:
    assert "generation, s" in table_text(summary_part)


def test_with_json_stdout_holds_the_document_alone(summary: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with Console(3, json=True) as console:
        console.step(1, METRICS)
        console.warn("loud")
    console.table(summary)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == summary
    assert "step 1/3" in captured.err and "WARNING loud" in captured.err and "1.60x" in captured.err


def test_a_terminal_gets_a_live_bar_and_its_cursor_back() -> None:
    master, slave = os.openpty()
    reader = ThreadPoolExecutor(1).submit(read_all, master)
    with os.fdopen(slave, "w") as terminal, pytest.raises(KeyboardInterrupt), Console(2, out=terminal) as console:
        for event in (Began("generation"), Progress(5, 10, "sequences", 1.0), StepDone(1, {"time/step": 2.0})):
            console.show(event)
        raise KeyboardInterrupt
    seen = reader.result(timeout=10)
    assert "step 1/2" in seen and "eta 2s" in seen
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l") >= 0  # hidden, then shown again


def test_a_narrow_encoding_does_not_end_the_run(summary: dict[str, Any]) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(1, out=stream)
    console.note("naïve ×")
    console.table(summary)
    stream.flush()
    assert b"na?ve" in raw.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (3.14e-4, "3.1e-4"), (0.0123, "0.0123"), (12.34, "12.3"), (12345.6, "12,346")],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.4, "0s"), (59.6, "1m00s"), (261, "4m21s"), (3900, "1h05m")]
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_the_events_of_long_work_are_shown_and_its_result_is_returned(summary: dict[str, Any]) -> None:
    out = io.StringIO()

    def work() -> EventStream[str]:
        yield from as_stage("generation", inner())
        yield StepDone(1, METRICS)
        yield Warned("acceptance fell")
        yield Finished(summary)
        return "done"

    def inner() -> EventStream[None]:
        yield Began("reward")
        yield Ended("reward")
        yield Progress(5, 10, "rollouts", 2.0)
        yield Note("saved to [x]/policy")

    assert follow(work(), Console(2, out=out)) == "done"
    text = out.getvalue()
    shown = ["saved to [x]/policy", "step 1/2 | reward 0.61", "WARNING acceptance fell", "1.60x"]
    assert [text.index(part) for part in shown] == sorted(text.index(part) for part in shown)


def test_work_that_is_interrupted_is_closed_and_the_terminal_restored() -> None:
    closed: list[bool] = []

    def work() -> EventStream[None]:
        try:
            yield Note("first")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        follow(work(), Console(2, out=io.StringIO()))
    assert closed == [True]


def test_progress_without_a_terminal_is_one_line_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock_s = io.StringIO(), [100.0]
    monkeypatch.setattr("forerun.report.console.time.monotonic", lambda: clock_s[0])
    console = Console(2, out=out)
    console.begin("generation")
    for _ in range(4):
        clock_s[0] += 20.0
        console.progress(320, 512, "sequences", 12.5)
    assert out.getvalue().splitlines() == ["  generation: 320/512 sequences, 12.5/s, 15s left"] * 2
