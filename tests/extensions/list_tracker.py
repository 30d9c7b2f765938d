"""A tracker: keeps everything in lists."""

from collections.abc import Mapping
from typing import Any

STARTED: list[Any] = []
LOGGED: list[tuple[int, dict[str, Any]]] = []
FINISHED: list[dict[str, Any]] = []


class ListTracker:
    def start(self, run: Any) -> None:
        STARTED.append(run)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        LOGGED.append((step, dict(metrics)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        FINISHED.append(dict(summary))
