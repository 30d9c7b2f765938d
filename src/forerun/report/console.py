"""The console: a live bar on a terminal, one plain line per step anywhere else.

It consumes the events of long work (`forerun.events`) and is the only part of Forerun that prints while work goes on.
With `json=True` stdout carries the final JSON document and nothing else; text for people goes to stderr. What the lines
say is in `lines.py`.
"""

from __future__ import annotations

import errno
import json as jsonlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing, suppress
from io import TextIOWrapper
from types import TracebackType
from typing import Any, TextIO, TypeVar

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from forerun.errors import Interrupted, UserError
from forerun.events import Began, Ended, Event, EventStream, Finished, Note, StepDone, Warned
from forerun.events import Progress as ProgressEvent
from forerun.report.lines import eta, progress_text, step_line, summary_parts
from forerun.report.tables import WIDTH

HEARTBEAT_S = 30.0  # without a terminal: at most one progress line in this time
STAGE_NAMES = {"logprob": "log-probabilities", "train": "training", "prepare": "weight sync"}
RECENT_STEPS = 10  # steps from which the time left is estimated

T = TypeVar("T")


def follow(work: EventStream[T], console: Console) -> T:
    """Run `work` to its end, show its events and return its result."""
    with console, closing(work):
        try:
            event = next(work)
            while True:
                try:
                    console.show(event)
                except OSError as error:  # nobody reads any more, or a full disk
                    event = work.throw(console.lost(error))
                except BaseException as error:  # e.g. Ctrl-C while a line is printed: the work handles it
                    event = work.throw(error)
                else:
                    event = next(work)
        except StopIteration as end:
            result: T = end.value
            return result


class Console:
    """Prints the events of one run. `warnings` holds its distinct warnings."""

    def __init__(self, total_steps: int = 0, json: bool = False, out: TextIO | None = None) -> None:
        """Args: out: the stream for people in place of stdout (stderr with `json`)."""
        stream = out or (sys.stderr if json else sys.stdout)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a prompt in a narrow encoding must not end a run
        terminal = stream.isatty()
        self.total_steps = total_steps
        self.json = json
        self.warnings: list[str] = []
        self._muted = False
        self._rich = _Rich(file=stream, width=None if terminal else WIDTH, highlight=False)
        self._bars = _Bars(self._rich, total_steps) if terminal else None
        self._stages: list[str] = []  # those under way, the innermost last
        self._last_reward: float | None = None
        self._last_step_s: float | None = None  # when it ended
        self._intervals_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._heartbeat_s = time.monotonic()

    def __enter__(self) -> Console:
        """Start the live display, where there is a terminal."""
        if self._bars:
            self._bars.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the live display and restore the terminal."""
        self.close()

    def close(self) -> None:
        """Stop the live display. Lines can still be printed afterwards."""
        if self._bars:
            with suppress(OSError):  # the terminal is gone
                self._bars.live.stop()

    def lost(self, error: OSError) -> BaseException:
        """The stream cannot be written: only warnings are shown from now on, on stderr. What the work should raise."""
        self._bars = None
        self._rich = _Rich(file=sys.stderr, width=WIDTH, highlight=False)
        self._muted = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr) if self.json else (sys.stdout,):
            with suppress(OSError, ValueError):  # a stream of a test or a notebook has no descriptor
                os.dup2(nowhere, stream.fileno())  # what is buffered would fail again when the process ends
        os.close(nowhere)
        if error.errno in (errno.EPIPE, errno.EIO):
            return Interrupted(signal.SIGPIPE)
        return UserError(f"The output of this command cannot be written ({error.strerror})")

    def show(self, event: Event) -> None:
        """Print one event."""
        if self._muted and not isinstance(event, Warned):
            return
        match event:
            case Began(stage):
                self.begin(stage)
            case Ended():
                self.end()
            case ProgressEvent(done, total, unit, rate):
                self.progress(done, total, unit, rate)
            case Note(text):
                self.note(text)
            case Warned(text):
                self.warn(text)
            case StepDone(step, metrics):
                self.step(step, metrics)
            case Finished(summary):
                self.table(summary)

    def begin(self, stage: str) -> None:
        """A stage begins within the present one."""
        self._stages.append(stage)
        self._heartbeat_s = time.monotonic()
        self._show_stage()

    def end(self) -> None:
        """The innermost stage has ended."""
        self._stages.pop()
        self._show_stage()

    def progress(self, done: float, total: float, unit: str, rate: float | None = None) -> None:
        """Show how far the present stage is.

        Args:
            done, total: in `unit`; a total of 0 means that it is not known.
            unit: plural noun, such as "tokens" or "sequences".
            rate: units per second, for the time left.
        """
        text = progress_text(done, total, unit, rate)
        if self._bars:
            self._bars.progress(done, total, text)
        elif time.monotonic() - self._heartbeat_s >= HEARTBEAT_S:
            self._heartbeat_s = time.monotonic()
            self.note(f"  {self._stage or 'running'}: {text}")

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Print the line of a finished step (counted from 1)."""
        self._note_interval(metrics.get("time/step"))
        eta_s = self._eta_s(step)
        self.note(step_line(step, self.total_steps, metrics, self._last_reward, eta_s))
        if metrics.get("reward/mean") is not None:
            self._last_reward = metrics["reward/mean"]
        if self._bars:
            self._bars.step(step, f"{step}/{self.total_steps} {eta(eta_s)}")

    def note(self, text: str) -> None:
        """Print one line."""
        self._rich.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> list[str]:
        """Print a warning in red and keep it; returns all warnings so far."""
        self._rich.print(f"[bold red]WARNING[/] {escape(text)}", soft_wrap=True)
        if text not in self.warnings:
            self.warnings.append(text)
        return self.warnings

    def table(self, summary: Mapping[str, Any]) -> None:
        """Print the final table; with `json`, also the summary as one JSON document on stdout."""
        self.close()
        self.print(*summary_parts(summary))
        if self.json:
            sys.stdout.write(jsonlib.dumps(dict(summary), indent=2, default=str) + "\n")
            sys.stdout.flush()

    def print(self, *parts: Any) -> None:
        """Print tables (`tables.table`) and text with rich's markup."""
        for part in parts:
            self._rich.print(part)

    @property
    def _stage(self) -> str:
        """The innermost stage, as people read it."""
        return STAGE_NAMES.get(self._stages[-1], self._stages[-1]) if self._stages else ""

    def _show_stage(self) -> None:
        if self._bars:
            self._bars.stage(self._stage)

    def _note_interval(self, step_s: float | None) -> None:
        """Time since the last step; of the first one, what its metrics say."""
        now = time.monotonic()
        interval = step_s if self._last_step_s is None else now - self._last_step_s
        self._last_step_s = now
        if interval is not None:
            self._intervals_s.append(interval)

    def _eta_s(self, step: int) -> float | None:
        if not self._intervals_s:
            return None
        return max(0, self.total_steps - step) * sum(self._intervals_s) / len(self._intervals_s)


class _Rich(RichConsole):
    """Rich's console, which leaves it to the caller what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        """Called within the handling of that error."""
        raise


class _Bars:
    """The live display: one bar for the run, one for the stage."""

    def __init__(self, console: RichConsole, total_steps: int) -> None:
        columns = [TextColumn("{task.description:<12}"), BarColumn(bar_width=28), TextColumn("{task.fields[text]}")]
        self.live = Progress(*columns, console=console, transient=True, refresh_per_second=4)
        self._steps: TaskID = self.live.add_task("steps", total=total_steps, text=f"0/{total_steps}")
        self._stage: TaskID = self.live.add_task("", total=None, text="", visible=False)

    def stage(self, name: str) -> None:
        self.live.reset(self._stage, description=name, total=None, text="", visible=bool(name))

    def progress(self, done: float, total: float, text: str) -> None:
        self.live.update(self._stage, completed=done, total=total or None, text=text)

    def step(self, step: int, text: str) -> None:
        self.live.update(self._steps, completed=step, text=text)
