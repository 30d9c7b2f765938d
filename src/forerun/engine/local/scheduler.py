"""Maps sequences to KV-cache rows. Plain Python, no tensors.

Live sequences fill rows 0 .. live-1 (slots) without gaps. Prompts are prefilled once into the rows above and copied
from there into a slot for each of their samples; a prompt's row is freed when its last sample has been admitted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from forerun.types import Rollout


@dataclass(slots=True)
class LiveSequence:
    """One sample in flight. `length` tokens are in the policy's cache; the newest token is not among them yet."""

    prompt_ids: list[int]
    prompt_index: int
    sample_index: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    rounds: int = 0
    finish_reason: str = ""

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.tokens) - 1

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt_ids[-1]

    def rollout(self) -> Rollout:
        return Rollout(
            self.prompt_ids, self.tokens, self.logprobs, self.versions, self.finish_reason,
            self.prompt_index, self.sample_index, self.rounds, self.drafted,
        )  # fmt: skip


class Scheduler:
    """Admission in the order of the requests: (prompt, sample), all samples of a prompt before the next one's."""

    def __init__(
        self, slots: int, prompts: Sequence[list[int]], requests: Sequence[tuple[int, int]], seed: int
    ) -> None:
        self.slots, self.prompts, self.seed = slots, prompts, seed
        self.live: list[LiveSequence] = []
        self._waiting = deque(requests)
        self._row_of: dict[int, int] = {}  # prompt -> row of its prefill
        samples = Counter(prompt for prompt, _ in requests)
        self._unfilled = deque(samples)  # prompts before their prefill
        fewest = min(samples.values(), default=1)
        self.prompt_rows = min(len(prompts), -(-slots // fewest))  # above the slots: prompts that fill all at once

    @property
    def done(self) -> bool:
        return not self.live and not self._waiting

    def extend(self, requests: Sequence[tuple[int, int]]) -> None:
        """More samples, those of a prompt that waits next to its others."""
        for prompt, sample in requests:
            places = [place for place, (waiting, _) in enumerate(self._waiting) if waiting == prompt]
            self._waiting.insert(places[-1] + 1 if places else len(self._waiting), (prompt, sample))
            if not places:
                self._unfilled.append(prompt)

    def to_prefill(self) -> list[int]:
        """Prompts to prefill now, as many as rows are free; none while the next sample in line has its prompt ready."""
        if not self._waiting or len(self.live) >= self.slots or self._waiting[0][0] in self._row_of:
            return []
        free = self.prompt_rows - len(self._row_of)
        chosen = [self._unfilled.popleft() for _ in range(min(free, len(self._unfilled)))]
        used = set(self._row_of.values())
        rows = [r for r in range(self.slots, self.slots + self.prompt_rows) if r not in used]
        self._row_of.update(zip(chosen, rows, strict=False))
        return chosen

    def row_of(self, prompt: int) -> int:
        """Cache row that holds the prompt's prefill."""
        return self._row_of[prompt]

    def admit(self, row: int | None = None) -> tuple[int, int] | None:
        """Admit the next waiting sample to `row` (None: a new one at the end). Returns (row to copy from, its row)."""
        if not self._waiting or (row is None and len(self.live) >= self.slots):
            return None
        prompt, sample = self._waiting[0]
        if prompt not in self._row_of:
            return None
        self._waiting.popleft()
        sequence = LiveSequence(self.prompts[prompt], prompt, sample, request_seed(self.seed, prompt, sample))
        source = self._row_of[prompt]
        if not self._waiting or self._waiting[0][0] != prompt:
            del self._row_of[prompt]
        if row is None:
            self.live.append(sequence)
            return source, len(self.live) - 1
        self.live[row] = sequence
        return source, row

    def vacate(self, row: int) -> int | None:
        """Close the gap at `row` with the last live sequence. Returns the row it came from, None without a gap."""
        last = self.live.pop()
        if row == len(self.live):
            return None
        self.live[row] = last
        return len(self.live)


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """A seed of its own for every sample: splitmix64 over (seed, prompt, sample), as a signed 64-bit integer."""
    state = 0
    for part in (seed, prompt, sample):
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state
