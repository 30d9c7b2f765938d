"""Stale-drafter detection: warns when acceptance drops after a weight update.

The first rounds after each load or resume are compared with the first rounds after the load before, because the
beginnings of answers are harder to draft than their average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forerun.engine.counters import Counters

ROUNDS = 64  # compared after a load: enough to tell 2.5 tokens per round from 1.3
COLLAPSE = 0.5  # of the known accepted drafts per round; below it the drafter is suspected


@dataclass(slots=True)
class StaleDrafterDetector:
    """Compares accepted drafts per round (acceptance length minus one) in the first rounds after successive loads."""

    _start: Counters
    known: float | None = None
    _open: bool = True

    def restart(self, counters: Counters) -> None:
        """Weights changed: the next rounds are compared."""
        self._start, self._open = counters.copy(), True

    def look(self, counters: Counters) -> str | None:
        """A warning, once, when acceptance has collapsed since the load before; else None."""
        if not self._open or counters.rounds - self._start.rounds < ROUNDS:
            return None
        self._open = False
        before, self.known = self.known, (counters.minus(self._start).acceptance_length or 1.0) - 1
        if before is None or self.known >= COLLAPSE * before:
            return None
        return (
            f"Acceptance collapsed after a weight load: {self.known:.2f} accepted drafts a round, {before:.2f} before. "
            "The drafter may be stale or of another policy; rollouts stay exact but become slow"
        )
