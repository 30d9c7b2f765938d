"""Group-relative advantages (GRPO, Shao et al. 2402.03300): a sample is good if it beats its siblings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from forerun.config import TrainConfig


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """Reward minus the group's mean, over the group's standard deviation unless `normalize_std` is false.

    Args:
        rewards: [P, n], n samples of each of P prompts.

    Returns:
        [P, n] float32; exactly 0 throughout a group whose rewards are all equal.
    """
    centred = rewards.float() - rewards.float().mean(dim=1, keepdim=True)
    centred = centred.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0)
    if not normalize_std:
        return centred
    return centred / (rewards.float().std(dim=1, keepdim=True) + 1e-6)


def grpo_advantages(rewards: Tensor, config: TrainConfig) -> Tensor:
    """Over the group's standard deviation, where `train.normalize_std` says so. [P, n] -> [P, n]"""
    return group_advantages(rewards, config.normalize_std)


def centred_advantages(rewards: Tensor, config: TrainConfig) -> Tensor:
    """Reward minus the group's mean: dividing by the deviation favours questions that are too easy or too hard
    (Dr. GRPO, Liu et al. 2503.20783). [P, n] -> [P, n]"""
    return group_advantages(rewards, normalize_std=False)
