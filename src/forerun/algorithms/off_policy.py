"""Off-policy correction: importance weights for tokens that were not sampled from the policy being trained.

The engine's log-probabilities (behaviour) come with the tokens, each from the weight version and the numerics that
sampled it. The learner recomputes them before its update (old). The weight is made from π_old/π_behaviour; the ratio
π/π_old of the clipped surrogate is separate from it (the decoupled objective, Hilton et al. 2110.00641). A sequence
with tokens of several versions is no special case: each ratio refers to its token's version.

A token's weight corrects for that token, not for its prefix: exact for completions of one token, beyond that a bias of
first order in the distance of the policies. The product over the prefix is unbiased, but its variance grows
exponentially with the length. The KL penalty has no weights.
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
    """Importance weight of every token, and which were truncated or masked. Masked tokens have weight 0.

    The normaliser of the loss still counts them: masking lowers the gradient and does not scale up the rest.
    """

    importance_weights: Tensor  # [M] float32
    truncated: Tensor  # [M] bool, weight bounded by the cap
    masked: Tensor  # [M] bool

    def metrics(self, lengths: Sequence[int]) -> dict[str, float]:
        """Mean weight; shares of truncated tokens, masked tokens and masked sequences; effective sample size.

        The effective sample size is Kish's (Σw)²/Σw² over the number of tokens: 1 when all weights are equal.
        """
        tokens = max(1, len(self.importance_weights))
        sequences = [part for part in self.masked.split(list(lengths)) if len(part)]
        total, squares = float(self.importance_weights.sum()), float((self.importance_weights**2).sum())
        return {
            "mismatch/is_weight_mean": total / tokens,
            "mismatch/is_weight_capped": float(self.truncated.sum()) / tokens,
            "mismatch/masked_tokens": float(self.masked.sum()) / tokens,
            "mismatch/masked_sequences": sum(bool(part.all()) for part in sequences) / max(1, len(sequences)),
            "mismatch/effective_samples": total**2 / squares / tokens if squares else 0.0,
        }


def correct(config: TrainConfig, old: Tensor, behaviour: Tensor, lengths: Sequence[int]) -> Correction:
    """Weights by `config.correction`, of S sequences end to end.

    - `token_tis`: min(ratio, cap) per token. Truncated importance sampling (Ionides 2008), on the mismatch of engine
      and learner by Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    - `icepop`: the ratio itself inside the band, 0 outside. IcePop (Ling Team 2510.18855, "Every Step Evolves").
    - `sequence_mask`: token_tis, but 0 in sequences whose geometric mean ratio is outside the band. Sequences are
      masked as in Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the
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
