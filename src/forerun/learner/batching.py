"""Micro-batches: of a bounded number of tokens, padded or packed, and what the loss reads of them.

Axes: M completion tokens of a micro-batch, T of one rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forerun.algorithms import PolicyBatch
from forerun.config import TrainConfig
from forerun.learner.packing import packed_microbatches
from forerun.models.logprobs import TokenBatch, microbatches, packed_batch, token_batch
from forerun.types import Rollout


@dataclass(frozen=True, slots=True)
class Targets:
    """What the loss reads of one rollout beside the policy's log-probabilities, see `PolicyBatch`."""

    old: Tensor  # [T]
    behaviour: Tensor  # [T]
    reference: Tensor | None  # [T]
    advantages: Tensor  # [T]
    importance_weights: Tensor  # [T]

    @property
    def has_gradient(self) -> bool:
        """Whether the loss of these tokens depends on the policy."""
        return self.reference is not None or bool(self.advantages.any() and self.importance_weights.any())

    def clone(self) -> Targets:
        """A copy that shares no storage with the other rollouts'."""
        reference = None if self.reference is None else self.reference.clone()
        return Targets(
            self.old.clone(),
            self.behaviour.clone(),
            reference,
            self.advantages.clone(),
            self.importance_weights.clone(),
        )


def policy_batch(logprobs: Tensor, targets: Sequence[Targets]) -> PolicyBatch:
    """Some rollouts end to end, on the device of their `logprobs` [M]."""

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts or [torch.empty(0)]).to(logprobs.device)

    references = [t.reference for t in targets if t.reference is not None]
    lengths = torch.tensor([len(t.old) for t in targets], dtype=torch.int64)
    return PolicyBatch(
        logprobs=logprobs,
        old=joined([t.old for t in targets]),
        behaviour=joined([t.behaviour for t in targets]),
        reference=joined(references) if references else None,
        advantages=joined([t.advantages for t in targets]),
        importance_weights=joined([t.importance_weights for t in targets]),
        sequence=torch.arange(len(targets)).repeat_interleave(lengths).to(logprobs.device),
    )


def token_batches(
    rollouts: Sequence[Rollout],
    chosen: Sequence[int],
    config: TrainConfig,
    packed: bool,
    device: torch.device,
    all_reduce_max: Callable[[int], int],
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Micro-batches of the chosen rollouts, each with their numbers in the order of its completions.

    All ranks run as many as the one that has most; the missing ones are empty.
    """
    pairs = [(rollouts[i].prompt_ids, rollouts[i].tokens) for i in chosen]
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    if packed:
        groups = packed_microbatches(lengths, config.microbatch_tokens)
    else:
        groups = [[[j] for j in group] for group in microbatches(lengths, config.microbatch_tokens)]
    missing = all_reduce_max(len(groups)) - len(groups)
    for group in groups:
        batch = packed_batch([[pairs[j] for j in row] for row in group], device)
        yield [chosen[j] for row in group for j in row], batch if packed else replace(batch, position_ids=None)
    for _ in range(missing):
        yield [], token_batch([([0], [])], device)


def by_rollout(values: Tensor, rows: Sequence[int], rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Tensor]]:
    """The values [M] of a micro-batch's tokens as (number of the rollout, [T])."""
    yield from zip(rows, values.split([len(rollouts[i].tokens) for i in rows]), strict=True)
