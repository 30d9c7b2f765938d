"""Experiment trackers: where a run's metrics go in addition to its folder, e.g. Weights & Biases or TensorBoard.

A tracker is a class without constructor arguments that has the methods of `Tracker`. A recipe names it by its entry
point of the group `forerun.trackers` or by its path: `trackers: [my_package.my_module:MyTracker]`. `start` may refuse a
run with a UserError; errors in `log` and `finish` are counted and warned about once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from forerun.errors import UserError
from forerun.registry import Registry

TRACKERS = Registry("tracker", {})


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker may know of a run when it starts."""

    folder: Path
    name: str  # of the recipe
    config: Mapping[str, Any]  # the resolved recipe
    environment: Mapping[str, Any] = field(default_factory=dict)  # the content of env.json
    step: int = 0  # last step already logged; above 0 for a resumed run


class Tracker(Protocol):
    """The contract of a tracker. Its methods are called in the learner's thread, between steps."""

    def start(self, run: RunInfo) -> None:
        """Called once, before the first step."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Called with the metrics of a step as in metrics.jsonl. Steps count from 1; 0 is the first evaluation.

        After a resume, steps may come again that the interrupted run has already logged.
        """

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Called once at the end of a run, with the content of summary.json."""


class GuardedTracker:
    """A tracker whose errors do not end the run. `failures` counts them."""

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], object] = warnings.warn) -> None:
        """Args: name: as in the recipe. warn: called with a sentence at the first failure."""
        self.name = name
        self.failures = 0
        self._tracker = tracker
        self._warn = warn

    def start(self, run: RunInfo) -> None:
        """Start the tracker. Raises UserError when it cannot start, for example without a login."""
        try:
            self._tracker.start(run)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"The tracker '{self.name}' cannot start ({_short(error)}): mend or remove it.") from error

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Hand the metrics of a step on."""
        self._guarded(f"at step {step}", lambda: self._tracker.log(step, metrics))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Hand the summary on."""
        self._guarded("at the end of the run", lambda: self._tracker.finish(summary))

    def _guarded(self, when: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                self._warn(f"The tracker '{self.name}' failed {when} ({_short(error)}); the run goes on.")


def load_trackers(names: Sequence[str], warn: Callable[[str], object] = warnings.warn) -> list[GuardedTracker]:
    """One tracker per name or path, not started yet.

    Raises:
        UserError: a name is unknown, its module cannot be imported, or it cannot be constructed.
    """
    return [_load(name, warn) for name in names]


def _load(name: str, warn: Callable[[str], object]) -> GuardedTracker:
    made = TRACKERS.load(name)
    try:
        tracker = made()
    except Exception as error:
        raise UserError(f"The tracker '{name}' cannot be constructed: {_short(error)}") from error
    missing = [method for method in ("start", "log", "finish") if not callable(getattr(tracker, method, None))]
    if missing:
        raise UserError(f"The tracker '{name}' has no method {' and no '.join(missing)}.")
    return GuardedTracker(name, tracker, warn)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
