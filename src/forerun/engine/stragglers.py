"""Finds replicas that are slow, as opposed to dead: their seconds per token against the others' in the same stream.

A replica that sends heartbeats between its rounds is alive, however long they take, and is not replaced; but the step
waits for it. One long sample is enough to look slow in one stream: a straggler is reported after several in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

SLOW = 2.0  # times the median of the others
STREAK = 3  # streams in a row


@dataclass(slots=True)
class Pace:
    """One replica in the stream under way."""

    began_s: float = 0.0
    busy_s: float = 0.0  # until its last sample
    tokens: int = 0

    @property
    def token_s(self) -> float:
        """Seconds per token that it delivered."""
        return self.busy_s / self.tokens


@dataclass(slots=True)
class Stragglers:
    """The pace of all replicas, stream after stream."""

    slowest_ratio: float = 1.0  # of the last stream: the largest seconds per token over the median of the others'
    _paces: dict[int, Pace] = field(default_factory=dict)
    _streaks: dict[int, int] = field(default_factory=dict)

    def begin(self, replica: int, at_s: float) -> None:
        """A stream was asked of it. A successor is timed from here on, not for the one it replaces."""
        self._paces[replica] = Pace(at_s)

    def delivered(self, replica: int, tokens: int, at_s: float) -> None:
        """A sample of so many tokens has come."""
        pace = self._paces[replica]
        pace.tokens += tokens
        pace.busy_s = at_s - pace.began_s

    def report(self) -> list[str]:
        """The stream has ended: a sentence for each replica that was slow often enough, once per streak."""
        warnings = []
        self.slowest_ratio = 1.0
        for replica, ratio in self._ratios().items():
            self.slowest_ratio = max(self.slowest_ratio, ratio)
            streak = self._streaks.get(replica, 0) + 1 if ratio > SLOW else 0
            self._streaks[replica] = streak
            if streak == STREAK:
                warnings.append(
                    f"Replica {replica} is alive but slow: {self._paces[replica].token_s * 1e3:.3g} ms per token, "
                    f"{ratio:.1f} times the others' median, in {STREAK} streams in a row; every step waits for it"
                )
        self._paces = {}
        return warnings

    def _ratios(self) -> dict[int, float]:
        paces = {replica: pace.token_s for replica, pace in self._paces.items() if pace.tokens}
        others = {r: [p for other, p in paces.items() if other != r] for r in paces}
        return {r: paces[r] / middle for r in paces if others[r] and (middle := median(others[r])) > 0}
