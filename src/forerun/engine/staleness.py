"""The alarm for the silent failure of every peer: a stale drafter that only makes things slow.

After each load or resume the acceptance of the first rounds is held against that of the first rounds after the load
before: openings against openings, because answers begin at places that are harder to draft than their average.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from forerun.engine.base import Counters

ROUNDS = 64  # looked at after a load: enough to tell 2.5 tokens per round from 1.3
COLLAPSE = 0.5  # share of the known accepted drafts per round below which the drafter is suspected


@dataclass(slots=True)
class StaleDrafterDetector:
    """Compares accepted drafts per round (acceptance length minus one) in the opening rounds of successive loads."""

    known: float | None = None
    _start: Counters = field(default_factory=Counters)
    _open: bool = True

    def restart(self, counters: Counters) -> None:
        """Weights changed: the rounds from here on are an opening."""
        self._start, self._open = counters.copy(), True

    def look(self, counters: Counters) -> str | None:
        """A sentence when this opening has collapsed against the one before, once; else None."""
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
