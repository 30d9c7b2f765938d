"""Losses of the policy, per token. Everything here reads the policy's log-probabilities, never a drafter's.

Axes: M completion tokens of a micro-batch, flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Per-token loss and what the clipping did."""

    loss: Tensor  # [M]
    ratio: Tensor  # [M] detached
    clipped_low: Tensor  # [M] bool
    clipped_high: Tensor  # [M] bool


def clipped_policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float, correction: Tensor
) -> PolicyLoss:
    """PPO's clipped surrogate with separate bounds (DAPO's clip-higher), times a detached off-policy correction.

    Args:
        logprobs: [M] under the policy being trained. old: [M] under the policy before this batch, recomputed by the
            learner. advantages: [M]. correction: [M], see `algorithms/off_policy.py`.
    """
    ratio = (logprobs - old).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages) * correction
    active = ratio.detach()
    low = (active < 1 - clip_low) & (advantages < 0)
    high = (active > 1 + clip_high) & (advantages > 0)
    return PolicyLoss(loss, active, low, high)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) per token on the policy's samples: r - 1 - log r with r = π_ref/π (k3, unbiased)."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1 - log_ratio
