"""Trackers that a user could write: one that records, and ones that fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forerun.tracking.trackers import RunInfo


class Recording:
    """Keeps every call of every instance, in order."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def start(self, run: RunInfo) -> None:
        self.calls.append(("start", run.name, run.step))

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.calls.append(("log", step, dict(metrics)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.calls.append(("finish", dict(summary)))


class Offline(Recording):
    """Loses its connection after the start."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        raise ConnectionError(f"no route\nat step {step}")


class NoLogin(Recording):
    def start(self, run: RunInfo) -> None:
        raise RuntimeError("no API key")


class NeedsArguments(Recording):
    def __init__(self, project: str) -> None:
        self.project = project


class Incomplete:
    def start(self, run: RunInfo) -> None: ...
