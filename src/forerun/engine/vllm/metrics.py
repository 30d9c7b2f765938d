"""vLLM's speculative-decoding statistics as the engine's counters, and its output as rollouts.

vLLM reports drafts and accepted drafts per step, and per request when it ends. Tokens that were accepted beyond the end
of a sample are subtracted again, so that the numbers mean the same as the local engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from forerun.engine.base import Counters
from forerun.engine.local.scheduler import LiveSequence


@dataclass(slots=True)
class SpecDecodeMetrics:
    """A stat logger for vLLM that adds to `counters`."""

    counters: Counters = field(default_factory=Counters)

    def record(
        self, scheduler_stats: Any = None, iteration_stats: Any = None, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Add one scheduler step."""
        stats = getattr(scheduler_stats, "spec_decoding_stats", None)
        if stats is None:
            return
        c = self.counters
        c.rounds += stats.num_drafts
        c.round_tokens += stats.num_drafts + stats.num_accepted_tokens
        c.drafted += stats.num_draft_tokens
        for totals, new in (
            (c.accepted_at, stats.num_accepted_tokens_per_pos),
            (c.drafted_at, stats.num_draft_tokens_per_pos),
        ):
            for position, count in enumerate(new):
                totals[position] += count

    def log(self) -> None:
        """Part of vLLM's interface, like the next two: nothing to do."""

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...


@dataclass(slots=True)
class VllmRequest:
    """One sample in flight at vLLM."""

    sequence: LiveSequence
    emitted: int = 0  # by vLLM in all, with tokens beyond a stop string
    last: int = 0  # of these in the latest step

    def add(self, tokens: Sequence[int], logprobs: Any, version: int) -> None:
        """Add one step's tokens; the last of a round is not drafted."""
        sequence = self.sequence
        sequence.rounds += 1
        self.emitted, self.last = self.emitted + len(tokens), len(tokens)
        for place, (token, entry) in enumerate(zip(tokens, logprobs, strict=True)):
            sequence.tokens.append(token)
            sequence.logprobs.append(entry[token].logprob)
            sequence.versions.append(version)
            sequence.drafted.append(place < len(tokens) - 1)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens."""
        s = self.sequence
        for values in (s.tokens, s.logprobs, s.versions, s.drafted):
            del values[length:]

    def settle(self, spec: Any, counters: Counters) -> None:
        """Subtract what the last round accepted beyond the end. `spec`: vLLM's record of the request, if any."""
        kept = self.last - (self.emitted - len(self.sequence.tokens))  # of the last round
        accepted = self._accepted_last(spec)
        counters.round_tokens -= accepted + 1 - kept
        for position in range(kept, accepted):
            counters.accepted_at[position] -= 1
        if accepted >= kept:
            self.sequence.drafted[-1] = True  # the end was inside an accepted run

    def _accepted_last(self, spec: Any) -> int:
        """Drafts that vLLM accepted in the last round, those beyond the end included."""
        if spec is None:
            return self.last - 1
        rounds = sum(spec.per_step_accepted) + len(spec.per_step_accepted)
        behind = rounds + (self.sequence.rounds - len(spec.per_step_accepted)) - self.emitted
        return self.last - 1 + behind
