"""An engine: the local one, which also counts how often it was asked."""

from collections.abc import Iterator
from typing import Any

from forerun.engine.local.engine import LocalEngine
from forerun.types import Rollout


class CountingEngine(LocalEngine):
    """Counts its streams in `metrics()`."""

    streams = 0

    def stream(self, *arguments: Any, **settings: Any) -> Iterator[Rollout]:
        self.streams += 1
        return super().stream(*arguments, **settings)

    def metrics(self) -> dict[str, Any]:
        return super().metrics() | {"replicas": {"count": self.streams}}
