"""What the user sees while a run goes on: a live bar on a terminal, one plain line per step anywhere else.

    with Console(total_steps=8) as console:
        with console.stage("generation"):
            console.progress(320, 512, "sequences", rate=12.5)     # rate in units per second
        console.step(3, metrics)
    console.table(summary)

Lines carry names and units and are ASCII. "accept 3.1/6" is the acceptance length over its largest value k + 1. With
`json=True` stdout carries the final JSON document and nothing else; everything meant for people goes to stderr.
Left out: writing files, and deciding anything.
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from types import TracebackType
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from forerun.report.format import duration, number
from forerun.report.summary import (
    comparison_note,
    comparison_rows,
    drafter_words,
    stage_rows,
    verdict,
)

PLAIN_WIDTH = 120  # columns where there is no terminal to ask
HEARTBEAT_S = 30.0  # without a terminal: at most one progress line in this time
RECENT_STEPS = 10  # the estimate of what is left looks at so many steps


class Console:
    """The one place that prints. `warnings` holds every distinct warning of the run, for the summary."""

    def __init__(self, total_steps: int, json: bool = False, out: TextIO | None = None) -> None:
        """Print for a run of `total_steps`; `out` replaces the stream for people (stdout, or stderr with `json`)."""
        stream = out or (sys.stderr if json else sys.stdout)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a prompt in a narrow encoding must not end a run
        self.total_steps = total_steps
        self.json = json
        self.warnings: list[str] = []
        terminal = stream.isatty()
        self._rich = RichConsole(file=stream, width=None if terminal else PLAIN_WIDTH, highlight=False)
        self._live = _progress_bars(self._rich) if terminal else None
        self._steps_task, self._stage_task = _add_bars(self._live, total_steps)
        self._stage = ""
        self._last_reward: float | None = None
        self._last_call_s: float | None = None
        self._intervals_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._heartbeat_s = time.monotonic()

    def __enter__(self) -> Console:
        """Start the live display, where there is a terminal."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the live display and give the terminal back, whatever happened."""
        self.close()

    def close(self) -> None:
        """Stop the live display. Lines can still be printed afterwards."""
        if self._live:
            self._live.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show `name` as what is going on; stages may be nested, the outer one comes back."""
        outer, self._stage = self._stage, name
        self._heartbeat_s = time.monotonic()
        self._show_stage(name)
        try:
            yield
        finally:
            self._stage = outer
            self._show_stage(outer)

    def progress(self, done: float, total: float, unit: str, rate: float | None = None) -> None:
        """Show how far the present stage is.

        Args:
            done, total: in `unit`; a total of 0 means that it is not known.
            unit: plural noun, such as "tokens" or "sequences".
            rate: units per second, from which the time left is told.
        """
        words = _progress_words(done, total, unit, rate)
        if self._live:
            self._live.update(self._stage_task, completed=done, total=total or None, words=words)
        elif time.monotonic() - self._heartbeat_s >= HEARTBEAT_S:
            self._heartbeat_s = time.monotonic()
            self._line(f"  {self._stage or 'running'}: {words}")

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Print the line of a finished step (counted from 1) from its metrics; what is missing is left out."""
        self._note_interval(metrics.get("time/step"))
        eta_s = self._eta_s(step)
        self._line(step_line(step, self.total_steps, metrics, self._last_reward, eta_s))
        if metrics.get("reward/mean") is not None:
            self._last_reward = metrics["reward/mean"]
        if self._live:
            self._live.update(self._steps_task, completed=step, words=f"{step}/{self.total_steps} {_left(eta_s)}")

    def note(self, text: str) -> None:
        """Print one line that the user should know."""
        self._line(text)

    def warn(self, text: str) -> list[str]:
        """Print a warning that cannot be overlooked, keep it for the summary, and return all warnings so far."""
        self._rich.print(f"[bold red]WARNING[/] {escape(text)}", soft_wrap=True)
        if text not in self.warnings:
            self.warnings.append(text)
        return self.warnings

    def table(self, summary: Mapping[str, Any]) -> None:
        """Print the final table; with `json`, also the summary as one JSON document on stdout."""
        self.close()
        for part in summary_parts(summary):
            self._rich.print(part)
        if self.json:
            sys.stdout.write(jsonlib.dumps(dict(summary), indent=2, default=str) + "\n")
            sys.stdout.flush()

    def _line(self, text: str) -> None:
        self._rich.print(escape(text), soft_wrap=True)

    def _show_stage(self, name: str) -> None:
        if self._live:
            self._live.reset(self._stage_task, description=name, total=None, words="", visible=bool(name))

    def _note_interval(self, step_s: float | None) -> None:
        now = time.monotonic()
        interval = step_s if self._last_call_s is None else now - self._last_call_s
        self._last_call_s = now
        if interval is not None:
            self._intervals_s.append(interval)

    def _eta_s(self, step: int) -> float | None:
        if not self._intervals_s:
            return None
        return max(0, self.total_steps - step) * sum(self._intervals_s) / len(self._intervals_s)


def step_line(
    step: int, total: int, metrics: Mapping[str, float | None], last_reward: float | None, eta_s: float | None
) -> str:
    """One step in one line, such as "step  42/200 | reward 0.61 +0.02 | len 58 (trunc 3%) | gen 11.4s 402 tok/s ...".

    The signed number behind the reward is the change since the step before.
    """
    head = f"step {step:>{len(str(total))}}/{total}"
    parts = [
        head,
        _reward_part(metrics, last_reward),
        _length_part(metrics),
        _generation_part(metrics),
        _joined(
            _value("logprob", metrics.get("time/logprob"), "{:.1f}s"),
            _value("train", metrics.get("time/train"), "{:.1f}s"),
        ),
        _value("", metrics.get("time/step"), "{:.1f}s/step"),
        _small("kl", metrics.get("policy/kl")) or _small("mismatch", metrics.get("mismatch/kl")),
        _comparison_part(metrics),
        _eval_part(metrics),
        _left(eta_s),
    ]
    return " | ".join(part for part in parts if part)


def _value(label: str, value: float | None, form: str) -> str:
    return "" if value is None else f"{label} {form.format(value)}".strip()


def _small(label: str, value: float | None) -> str:
    return "" if value is None else f"{label} {number(value, 2)}"


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _left(eta_s: float | None) -> str:
    return "" if eta_s is None else f"eta {duration(eta_s)}"


def _reward_part(metrics: Mapping[str, float | None], last: float | None) -> str:
    reward = metrics.get("reward/mean")
    change = None if reward is None or last is None else reward - last
    return _joined(_value("reward", reward, "{:.2f}"), _value("", change, "{:+.2f}"))


def _length_part(metrics: Mapping[str, float | None]) -> str:
    length = _value("len", metrics.get("length/mean"), "{:.0f}")
    return _joined(length, _value("", metrics.get("length/truncated"), "(trunc {:.0%})")) if length else ""


def _generation_part(metrics: Mapping[str, float | None]) -> str:
    accept = _value("accept", metrics.get("spec/acceptance_length"), "{:.1f}")
    k = metrics.get("spec/k_mean")
    return _joined(
        _value("gen", metrics.get("time/generation"), "{:.1f}s"),
        _value("", metrics.get("perf/gen_tokens_per_s"), "{:.0f} tok/s"),
        accept + (f"/{k + 1:g}" if accept and k else ""),
    )


def _comparison_part(metrics: Mapping[str, float | None]) -> str:
    return _value("", metrics.get("compare/speedup"), "{:.2f}x plain")


def _eval_part(metrics: Mapping[str, float | None]) -> str:
    return _joined(
        _value("eval", metrics.get("eval/reward"), "{:.3f}"), _value("+-", metrics.get("eval/stderr"), "{:.3f}")
    )


def _progress_words(done: float, total: float, unit: str, rate: float | None) -> str:
    words = f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"
    if not rate:
        return words
    left = f", {duration((total - done) / rate)} left" if total else ""
    return f"{words}, {number(rate)}/s{left}"


def _progress_bars(console: RichConsole) -> Progress:
    columns = [TextColumn("{task.description:<12}"), BarColumn(bar_width=28), TextColumn("{task.fields[words]}")]
    return Progress(*columns, console=console, transient=True, refresh_per_second=4)


def _add_bars(live: Progress | None, total_steps: int) -> tuple[TaskID, TaskID]:
    if live is None:
        return TaskID(0), TaskID(1)
    steps = live.add_task("steps", total=total_steps, words=f"0/{total_steps}")
    return steps, live.add_task("", total=None, words="", visible=False)


def summary_parts(summary: Mapping[str, Any]) -> list[Table | str]:
    """The final table in parts that rich prints: comparison, stages, and the lines below them."""
    parts: list[Table | str] = ["", _comparison_table(summary), f"[dim]{escape(comparison_note(summary))}[/]"]
    if stage_rows(summary):
        parts += ["", _stage_table(summary)]
    parts += ["", escape(verdict(summary))]
    parts += [f"[bold red]WARNING[/] {escape(str(text))}" for text in summary.get("warnings") or []]
    return [*parts, "", _paths_table(summary)]


def _comparison_table(summary: Mapping[str, Any]) -> Table:
    steps = f", {summary['steps']} steps" if summary.get("steps") is not None else ""
    title = f"{summary.get('recipe', 'run')}{steps}: {drafter_words(summary)}"
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("plain", "speculative", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison_rows(summary):
        table.add_row(escape(row.label), row.plain, row.speculative, row.ratio)
    return table


def _stage_table(summary: Mapping[str, Any]) -> Table:
    rows = stage_rows(summary)
    decimals = 2 if sum(row.seconds for row in rows) >= 1 else 4
    table = Table(box=SIMPLE_HEAD)
    table.add_column("mean step", no_wrap=True)
    for row in rows:
        table.add_column(row.name, justify="right", no_wrap=True)
    table.add_row("seconds", *(f"{row.seconds:.{decimals}f}" for row in rows))
    table.add_row("percent", *(f"{100 * row.share:.1f}" for row in rows))
    return table


def _paths_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    if summary.get("wall_s") is not None:
        table.add_row("wall time", duration(summary["wall_s"]))
    if summary.get("machine"):
        table.add_row("machine", escape(str(summary["machine"])))
    for name, path in (summary.get("paths") or {}).items():
        if path:
            table.add_row(name, escape(str(path)))
    return table
