"""Group-relative advantages (GRPO, Shao et al. 2402.03300): a sample is good if it beats its siblings."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """Reward minus the group's mean, over the group's standard deviation unless `normalize_std` is false (Dr. GRPO).

    Args:
        rewards: [P, n], n samples of each of P prompts.

    Returns:
        [P, n] float32; exactly 0 throughout a group whose rewards are all equal.
    """
    centred = rewards.float() - rewards.float().mean(dim=1, keepdim=True)
    centred = torch.where(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, centred)
    if not normalize_std:
        return centred
    return centred / (rewards.float().std(dim=1, keepdim=True) + 1e-6)
