"""What a replicated engine has asked its replicas for, and whether what they return is an answer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from forerun.engine.base import Requests, Sampling, requested
from forerun.types import Rollout

ROUNDING = 1e-3  # by which a log-probability may exceed 0


@dataclass(slots=True)
class Stream:
    """A stream under way."""

    prompts: Sequence[list[int]]
    sampling: Sampling
    n: int
    pending: list[set[tuple[int, int]]]  # per replica: (prompt, sample) not delivered yet
    versions: set[int]  # that may have emitted its tokens

    @classmethod
    def routed(
        cls,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int,
        only: Requests | None,
        replicas: int,
        version: int,
    ) -> Stream:
        """Prompt i goes to replica i mod `replicas`: its samples share a prefill and a trie."""
        pending: list[set[tuple[int, int]]] = [set() for _ in range(replicas)]
        for prompt, sample in requested(len(prompts), n, only):
            pending[prompt % replicas].add((prompt, sample))
        return cls(prompts, sampling, n, pending, {version})

    def fault_of(self, rollout: Rollout, replica: int, vocabulary: int) -> str:
        """Why a rollout cannot be what the replica was asked for; "" when it can."""
        name = f"sample {rollout.sample_index} of prompt {rollout.prompt_index}"
        count, limit = len(rollout.tokens), self.sampling.max_new_tokens
        if (rollout.prompt_index, rollout.sample_index) not in self.pending[replica]:
            return f"{name} was not asked of it, or came twice"
        if rollout.prompt_ids != self.prompts[rollout.prompt_index]:
            return f"{name} has another prompt"
        if not 1 <= count <= limit or count != len(rollout.logprobs) or count != len(rollout.versions):
            return (
                f"{name} has {count} tokens of at most {limit}, {len(rollout.logprobs)} log-probabilities and "
                f"{len(rollout.versions)} versions"
            )
        if not 0 <= min(rollout.tokens) <= max(rollout.tokens) < vocabulary:
            return f"{name} holds a token id outside 0 .. {vocabulary - 1}"
        if not all(isfinite(x) and x <= ROUNDING for x in rollout.logprobs):
            return f"{name} has a log-probability that is not finite, or above 0"
        if not self.versions.issuperset(rollout.versions):
            return f"{name} is of versions {sorted(set(rollout.versions))}; it should be of {sorted(self.versions)}"
        return ""
