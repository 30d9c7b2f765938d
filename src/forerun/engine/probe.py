"""The alarm for the silent failure of every peer: a stale drafter that only makes things slow.

After each load or resume the first rounds' acceptance is held against the last known one; a collapse is a warning.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from forerun.engine.base import Counters

ROUNDS = 64  # looked at after a load: enough to tell 2.5 tokens per round from 1.3
COLLAPSE = 0.5  # share of the known accepted drafts per round below which the drafter is suspected


@dataclass(slots=True)
class AcceptanceProbe:
    """Compares accepted drafts per round (acceptance length minus one) across a load."""

    known: float | None = None
    _start: Counters = field(default_factory=Counters)
    _open: bool = False

    def restart(self, counters: Counters) -> None:
        """Weights changed: what was measured since the last restart becomes the known value, if it was enough."""
        since = counters.minus(self._start)
        if since.rounds >= ROUNDS and since.acceptance_length is not None:
            self.known = since.acceptance_length - 1
        self._start, self._open = counters.copy(), True

    def look(self, counters: Counters) -> str | None:
        """A sentence when the first rounds since the restart have collapsed, once; else None."""
        if not self._open or counters.rounds - self._start.rounds < ROUNDS:
            return None
        self._open = False
        now = (counters.minus(self._start).acceptance_length or 1.0) - 1
        if self.known is None or now >= COLLAPSE * self.known:
            return None
        return (
            f"Acceptance collapsed after a weight load: {now:.2f} accepted drafts per round, {self.known:.2f} before. "
            "The drafter may be stale or of another policy; rollouts stay exact but become slow"
        )
