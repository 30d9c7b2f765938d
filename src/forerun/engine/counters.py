"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was made; rates come from differences. Rounds count one per sequence."""

    tokens: int = 0  # emitted
    rows: int = 0  # sequence-rounds, with or without a draft
    rounds: int = 0  # sequence-rounds that verified at least one draft token
    round_tokens: int = 0  # tokens emitted in those
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # rounds whose first j+1 drafts were all kept
    drafted_at: list[int] = field(default_factory=list)  # rounds that drafted at least j+1
    seconds: float = 0.0

    def minus(self, earlier: Counters) -> Counters:
        """What was added since `earlier`."""
        return self._combine(earlier, -1)

    def plus(self, other: Counters) -> Counters:
        """The sum of two spans."""
        return self._combine(other, 1)

    def copy(self) -> Counters:
        """A snapshot."""
        return self._combine(Counters(), 1)

    def _combine(self, other: Counters, sign: int) -> Counters:
        def combine(a: Any, b: Any) -> Any:
            if isinstance(a, list):
                return [x + sign * y for x, y in zip_longest(a, b, fillvalue=0)]
            return a + sign * b

        return Counters(*(combine(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    @property
    def acceptance_length(self) -> float | None:
        """Tokens emitted per round, the bonus token included; None before the first round."""
        return self.round_tokens / self.rounds if self.rounds else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """Entry j: share of rounds that drafted j+1 tokens or more in which the first j+1 were all kept."""
        return [a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True) if d]

    @property
    def k_mean(self) -> float | None:
        """Draft tokens verified per round."""
        return self.drafted / self.rounds if self.rounds else None
