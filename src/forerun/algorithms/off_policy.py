"""Off-policy correction: the engine sampled from a slightly other policy than the one that learns.

The engine's log-probabilities (behaviour) come with the tokens, each from the weight version and the numerics that
emitted it; the learner recomputes the same tokens before its update (old). The ratio π_old/π_behaviour is the
correction; the clipped surrogate's ratio π/π_old is another matter (the decoupled objective, Hilton et al. 2110.00641).
Tokens of several versions in one sequence need nothing more: each ratio is held against its own version.

A token's ratio corrects for that token alone, not for how likely its prefix was: exact for completions of one token, a
bias of first order in the distance of the policies beyond. Left out: the prefix's product, whose variance grows
exponentially with the length; a weight on the KL penalty, which counts every token alike.
Axes: M completion tokens, flat, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from forerun.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Correction:
    """Weight of every token's loss, and what was done to get it. Masked tokens have weight 0.

    They stay in the normaliser of the loss: dropping tokens lowers the gradient, it does not raise what is left.
    """

    weights: Tensor  # [M] float32
    truncated: Tensor  # [M] bool, cut at the cap
    masked: Tensor  # [M] bool

    def metrics(self, lengths: Sequence[int]) -> dict[str, float]:
        """Mean weight; share of tokens truncated, of tokens and of whole sequences masked; effective sample size.

        The effective sample size is Kish's (Σw)²/Σw² over the number of tokens: 1 when all weights are equal.
        """
        tokens = max(1, len(self.weights))
        sequences = [part for part in self.masked.split(list(lengths)) if len(part)]
        squares = float((self.weights**2).sum())
        return {
            "mismatch/is_weight_mean": float(self.weights.sum()) / tokens,
            "mismatch/is_weight_capped": float(self.truncated.sum()) / tokens,
            "mismatch/masked_tokens": float(self.masked.sum()) / tokens,
            "mismatch/masked_sequences": sum(bool(part.all()) for part in sequences) / max(1, len(sequences)),
            "mismatch/effective_samples": float(self.weights.sum()) ** 2 / squares / tokens if squares else 0.0,
        }


def correct(config: TrainConfig, old: Tensor, behaviour: Tensor, lengths: Sequence[int]) -> Correction:
    """The correction that `config.correction` names, of sequences laid end to end.

    - `token_tis`: min(ratio, cap) per token. Truncated importance sampling (Ionides 2008), on the mismatch of engine
      and learner by Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    - `icepop`: the ratio itself inside the band, 0 outside. IcePop (Ling Team 2510.18855, "Every Step Evolves").
    - `sequence_mask`: a sequence counts only if the geometric mean of its ratios lies in the band; then as token_tis.
      Sequences are dropped as in Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the
      Training-Inference Mismatch"; the mean and not the product, so that one band fits every length.
    - `none`: 1.

    Args:
        old: [M] log-probabilities by the learner. behaviour: [M] those that the engine returned with the tokens.
        lengths: S numbers of tokens that add up to M.
    """
    log_ratio = old - behaviour
    ratio, nothing = log_ratio.exp(), torch.zeros_like(log_ratio, dtype=torch.bool)
    if config.correction == "none":
        return Correction(torch.ones_like(ratio), nothing, nothing)
    if config.correction == "icepop":
        masked = ~_within(ratio, config.band)
        return Correction(ratio.masked_fill(masked, 0.0), nothing, masked)
    masked = nothing
    if config.correction == "sequence_mask":
        masked = ~_within(geometric_means(log_ratio, lengths), config.band)
    truncated = (ratio > config.importance_cap) & ~masked
    return Correction(ratio.clamp(max=config.importance_cap).masked_fill(masked, 0.0), truncated, masked)


def geometric_means(log_ratio: Tensor, lengths: Sequence[int]) -> Tensor:
    """The geometric mean of its sequence's ratios, at every token. [M] -> [M]"""
    means = [part.mean().expand(len(part)) for part in log_ratio.split(list(lengths))]
    return torch.cat(means).exp() if means else log_ratio


def _within(ratio: Tensor, band: tuple[float, float]) -> Tensor:
    return (ratio >= band[0]) & (ratio <= band[1])
