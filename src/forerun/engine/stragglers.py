"""Finds replicas that are slow, as opposed to dead: seconds per token and sample, against the others' in one stream.

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

    samples: int = 0  # that it decodes
    since_s: float = 0.0
    sample_s: float = 0.0  # seconds of all samples until then
    tokens: int = 0  # that it delivered

    @property
    def token_s(self) -> float:
        """Seconds that a sample takes for a token: they depend little on how many are decoded together."""
        return self.sample_s / self.tokens


@dataclass(slots=True)
class Stragglers:
    """The pace of all replicas, stream after stream."""

    slowest_ratio: float = 1.0  # of the last stream: the largest seconds per token and sample over the others' median
    _paces: dict[int, Pace] = field(default_factory=dict)
    _streaks: dict[int, int] = field(default_factory=dict)

    def decodes(self, replica: int, samples: int, at_s: float) -> None:
        """It decodes so many samples from now on."""
        pace = self._paces.setdefault(replica, Pace())
        pace.sample_s += pace.samples * (at_s - pace.since_s)
        pace.samples, pace.since_s = samples, at_s

    def delivered(self, replica: int, tokens: int) -> None:
        """A sample of so many tokens has come."""
        self._paces[replica].tokens += tokens

    def forget(self, replica: int) -> None:
        """It was lost. Its successor is timed for itself."""
        self._paces.pop(replica, None)

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
