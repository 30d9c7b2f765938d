"""What a replicated engine asks its replicas for, and whether what they return is an answer to it.

Samples are handed out as slots become free, not divided beforehand, so that no replica waits while another has more
than it can run. Samples of one prompt share a prefill, so they stay together unless a replica would have less to do
than the others for it. A sample's text depends on its seed, not on where it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    pending: list[set[tuple[int, int]]]  # per replica: (prompt, sample) asked for and not delivered yet
    versions: set[int]  # that may have emitted its tokens
    unasked: dict[int, deque[int]] = field(default_factory=dict)  # samples of a prompt that no replica was asked for
    asked: list[int] = field(default_factory=list)  # per replica: samples, since its process has this stream
    _newest: list[int] = field(default_factory=list)  # per replica: the prompt that it was asked for last, or -1
    _begun: set[int] = field(default_factory=set)  # prompts that some replica was asked for

    @classmethod
    def opened(
        cls,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int,
        only: Requests | None,
        replicas: int,
        version: int,
    ) -> Stream:
        """With everything still to be asked for."""
        unasked: dict[int, deque[int]] = {}
        for prompt, sample in requested(len(prompts), n, only):
            unasked.setdefault(prompt, deque()).append(sample)
        pending: list[set[tuple[int, int]]] = [set() for _ in range(replicas)]
        return cls(prompts, sampling, n, pending, {version}, unasked, [0] * replicas, [-1] * replicas)

    @property
    def waiting(self) -> int:
        """Samples that no replica was asked for."""
        return sum(map(len, self.unasked.values()))

    @property
    def unfinished(self) -> int:
        """Samples that have not been delivered."""
        return self.waiting + sum(map(len, self.pending))

    def hand_out(self, slots: int) -> dict[int, list[tuple[int, int]]]:
        """What to ask of which replica now; it counts as asked.

        The replica with the fewest samples is next, and gets samples of one prompt: at most its share among those
        that have as few. A replica fills its slots, and holds a reserve so that it need not wait for the driver: half
        an equal share of what is left, which vanishes towards the end. One replica alone gets everything.
        """
        given: dict[int, list[tuple[int, int]]] = {}
        replicas, left = len(self.pending), self.waiting
        while left:
            loads = [len(pending) for pending in self.pending]
            load = min(loads)
            room = left if replicas == 1 else slots + left // (2 * replicas) - load
            if room <= 0:
                break
            share = -(-left // loads.count(load))
            replica = loads.index(load)
            taken = self._take(replica, min(room, share))
            given.setdefault(replica, []).extend(taken)
            left -= len(taken)
        return given

    def _take(self, replica: int, limit: int) -> list[tuple[int, int]]:
        """Samples of one prompt: of the one that the replica has already, else of one that no replica has."""
        fresh = (prompt for prompt in self.unasked if prompt not in self._begun)
        newest = self._newest[replica]
        prompt = newest if newest in self.unasked else next(fresh, next(iter(self.unasked)))
        samples = self.unasked[prompt]
        taken = [(prompt, samples.popleft()) for _ in range(min(limit, len(samples)))]
        if not samples:
            del self.unasked[prompt]
        self._begun.add(prompt)
        self._newest[replica] = prompt
        self.pending[replica].update(taken)
        self.asked[replica] += len(taken)
        return taken

    def take_back(self, replica: int) -> int:
        """The replica is lost: what it has not delivered is to be asked for again; how many samples."""
        lost = sorted(self.pending[replica])
        for prompt, sample in reversed(lost):
            self.unasked.setdefault(prompt, deque()).appendleft(sample)
        self.pending[replica].clear()
        self.asked[replica], self._newest[replica] = 0, -1
        return len(lost)

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
