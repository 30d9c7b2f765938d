"""Stale-drafter detection: warns when acceptance drops after a weight update.

The first rounds after each load or resume are compared with the first rounds after earlier loads, because the
beginnings of answers are harder to draft than their average. Acceptance differs between prompts, and the first rounds
are of few prompts: so the comparison is with the lowest of the latest loads, and the fall must be both large and beyond
chance. Drafters without weights cannot be stale and are not watched.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from forerun.engine.counters import Counters

ROUNDS = 64  # compared after a load: enough to tell 2.5 tokens per round from 1.3
LOADS = 8  # with the lowest of so many
COLLAPSE = 0.5  # of the known accepted drafts per round; below it the drafter is suspected
CHANCE = 1e-5  # that an equally good drafter falls as far; a higher one is no alarm


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of the first rounds after a load: drafts that were tested, each at the first position that was not decided."""

    accepted: int
    rejected: int
    per_round: float

    @classmethod
    def of(cls, span: Counters) -> Self:
        """Trial j of a round takes place where draft j was made and the one before it was accepted."""
        reached = [span.rounds, *span.accepted_at]
        tested = [min(drafted, before) for drafted, before in zip(span.drafted_at, reached, strict=False)]
        accepted = sum(span.accepted_at)
        return cls(accepted, sum(tested) - accepted, (span.acceptance_length or 1.0) - 1)


def collapsed(before: Acceptance, after: Acceptance) -> bool:
    """Whether acceptance fell below `COLLAPSE` of what it was, and not by chance (Fisher's exact test, one-sided)."""
    if after.per_round >= COLLAPSE * before.per_round:
        return False
    from scipy.stats import hypergeom  # loads slowly

    trials = after.accepted + after.rejected
    everything = before.accepted + before.rejected + trials
    return bool(hypergeom.cdf(after.accepted, everything, before.accepted + after.accepted, trials) < CHANCE)


@dataclass(slots=True)
class StaleDrafterDetector:
    """Compares accepted drafts per round (acceptance length minus one) in the first rounds after successive loads."""

    _start: Counters
    watches: bool = True  # whether the drafter has weights
    known: deque[Acceptance] = field(default_factory=lambda: deque(maxlen=LOADS))
    _open: bool = True

    def restart(self, counters: Counters) -> None:
        """Weights changed: the next rounds are compared."""
        self._start, self._open = counters.copy(), True

    def look(self, counters: Counters) -> str | None:
        """A warning, once, when acceptance has collapsed since the loads before; else None."""
        if not (self.watches and self._open) or counters.rounds - self._start.rounds < ROUNDS:
            return None
        self._open = False
        after = Acceptance.of(counters.minus(self._start))
        before = min(self.known, key=lambda load: load.per_round, default=None)
        self.known.append(after)
        if before is None or not collapsed(before, after):
            return None
        return (
            f"Acceptance collapsed after a weight load: {after.per_round:.2f} accepted drafts a round, "
            f"{before.per_round:.2f} or more after the loads before. "
            "The drafter may be stale or of another policy; rollouts stay exact but become slow"
        )
