"""What an algorithm is: advantages, a loss per token, and how those losses become the loss of a batch.

Axes: P prompts, n samples of each, M completion tokens of whole sequences, flat. Micro-batches and ranks never split a
sequence. Nothing here or in `losses.py` imports torch: a recipe is checked, and a report written, without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from forerun.config import TrainConfig


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """What a loss reads of M completion tokens. Only `logprobs` has a gradient; none is a drafter's."""

    logprobs: Tensor  # [M] float32, by the policy being trained
    old: Tensor  # [M] by the policy before this batch, recomputed by the learner
    behaviour: Tensor  # [M] by the engine that sampled
    reference: Tensor | None  # [M] by the reference policy, where there is a KL penalty
    advantages: Tensor  # [M]
    importance_weights: Tensor  # [M] off-policy correction, see `off_policy.py`
    sequence: Tensor  # [M] int64, 0 for the tokens of the first sequence, 1 for those of the second, ...

    @property
    def weights(self) -> Tensor:
        """The earlier name of `importance_weights`. [M]"""
        return self.importance_weights


@dataclass(frozen=True, slots=True)
class Aggregation:
    """A batch's loss from its tokens' losses: `total` over all its micro-batches, divided by `size` of all of it."""

    total: Callable[[Tensor, Tensor], Tensor]  # losses [M], sequence [M] -> scalar
    size: Callable[[Sequence[int], int], float]  # tokens of each sequence, rollout.max_new_tokens


# The loss of every token [M], and sums over the tokens of what is to be logged, by name. The learner divides these by
# the batch's tokens. It leaves out sequences of zero advantage or weight, whose loss must have no gradient.
Loss = Callable[[PolicyBatch, "TrainConfig"], tuple["Tensor", dict[str, "Tensor"]]]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One entry of `ALGORITHMS`."""

    advantages: Callable[[Tensor, TrainConfig], Tensor]  # rewards [P, n] -> [P, n]
    loss: Loss
    aggregation: Aggregation
    metrics: Mapping[str, str]  # of every name that `loss` returns, a sentence and a unit
