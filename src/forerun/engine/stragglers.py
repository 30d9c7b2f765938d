"""Which replica is slow, as opposed to dead: seconds per token of each, against the others' in the same stream.

A replica that beats between its rounds is alive, however long they take, and is left alone; but the step waits for it.
One stream says little, because one long sample is enough to look slow: it takes several in a row to be told of.
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
    busy_s: float = 0.0  # until it was done
    tokens: int = 0

    @property
    def token_s(self) -> float:
        """Seconds per token that it delivered."""
        return self.busy_s / self.tokens


@dataclass(slots=True)
class Paces:
    """All replicas, stream after stream."""

    slowest_ratio: float = 1.0  # of the last stream: the largest seconds per token over the median of the others'
    _now: dict[int, Pace] = field(default_factory=dict)
    _streak: dict[int, int] = field(default_factory=dict)

    def begin(self, replica: int, at_s: float) -> None:
        """It was asked. A successor is timed from here on and not for what it replaces."""
        self._now[replica] = Pace(at_s)

    def delivered(self, replica: int, tokens: int, at_s: float) -> None:
        """A sample of so many tokens has come."""
        pace = self._now[replica]
        pace.tokens += tokens
        pace.busy_s = at_s - pace.began_s

    def judge(self) -> list[str]:
        """The stream has run out: a sentence for each replica that was slow often enough, once per streak."""
        told, self.slowest_ratio = [], 1.0
        for replica, ratio in self._ratios().items():
            self.slowest_ratio = max(self.slowest_ratio, ratio)
            streak = self._streak.get(replica, 0) + 1 if ratio > SLOW else 0
            self._streak[replica] = streak
            if streak == STREAK:
                told.append(
                    f"Replica {replica} is alive but slow: {self._now[replica].token_s * 1e3:.3g} ms per token, "
                    f"{ratio:.1f} times the others' median, in {STREAK} streams in a row; every step waits for it"
                )
        self._now = {}
        return told

    def _ratios(self) -> dict[int, float]:
        paces = {replica: pace.token_s for replica, pace in self._now.items() if pace.tokens}
        others = {r: [p for other, p in paces.items() if other != r] for r in paces}
        return {r: paces[r] / middle for r in paces if others[r] and (middle := median(others[r])) > 0}
