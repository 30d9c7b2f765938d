"""Losses of the policy per token, how they are aggregated, and the definitions of what they log.

Axes: M completion tokens of whole sequences, flat, of S sequences y_i with |y_i| tokens each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.algorithms.base import Aggregation, Algorithm, PolicyBatch
from forerun.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from forerun.config import TrainConfig

OBJECTIVE = {
    "policy/loss": "Policy loss of the batch, KL penalty included. Unit: loss.",
    "policy/kl": "Estimated KL divergence from the policy to the frozen reference. Unit: nats per token.",
}


def batch_loss(
    algorithm: Algorithm, batch: PolicyBatch, config: TrainConfig, size: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of some of a batch's sequences, with the KL penalty, and sums of their statistics.

    Losses and sums of a batch's parts add up to those of the batch.

    Args:
        size: `Aggregation.size` of the whole batch.

    Returns:
        A scalar; sums over tokens, but for "policy/loss", which is the loss.
    """
    total = algorithm.aggregation.total
    losses, sums = algorithm.loss(batch, config)
    if losses.shape != batch.logprobs.shape:
        raise UserError(
            f"The loss of train.algorithm={config.algorithm} has shape {list(losses.shape)} for "
            f"{len(batch.logprobs)} tokens; it must return one number per token"
        )
    loss = total(losses, batch.sequence) / size
    kl_sum = losses.new_zeros(())
    if batch.reference is not None:
        kl = kl_k3(batch.logprobs, batch.reference)
        kl_sum = kl.detach().sum()
        loss = loss + config.kl * total(kl, batch.sequence) / size
    return loss, sums | {"policy/loss": loss.detach(), "policy/kl": kl_sum}


# What a loss reads, in the order in which one that is not finite makes later ones so, reversed.
LOSS_INPUTS = {
    "importance_weights": "the off-policy importance weights",
    "advantages": "the advantages, which the algorithm makes from the rewards",
    "reference": "the reference policy's log-probabilities; check the reference's weights",
    "logprobs": "the policy's log-probabilities in this pass; check its weights, lower train.learning_rate, or use "
    "policy.dtype=float32",
    "old": "the policy's log-probabilities before the update; check its weights, or use policy.dtype=float32",
    "behaviour": "the log-probabilities that the engine returned with the tokens",
}


def loss_fault(loss: Tensor, batch: PolicyBatch) -> int:
    """0 when the loss is finite. Else 1, or 2 and more by which of `LOSS_INPUTS` was not: the highest is the cause."""
    if bool(loss.isfinite()):
        return 0
    values = [getattr(batch, name) for name in LOSS_INPUTS]
    return max([1, *(2 + i for i, x in enumerate(values) if x is not None and not bool(x.isfinite().all()))])


def loss_fault_text(algorithm: str, fault: int) -> str:
    """A sentence on `loss_fault`, without its end."""
    if fault == 1:
        cause = "all that it reads is finite, so look into the algorithm's loss itself"
    else:
        cause = f"not finite are {list(LOSS_INPUTS.values())[fault - 2]}"
    return f"The loss of train.algorithm={algorithm} is not finite: {cause}"


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) per token on the policy's samples: r - 1 - log r with r = π_ref/π (k3, unbiased)."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1 - log_ratio


# ---- losses ----

CLIPPING = {
    "policy/ratio_mean": "Mean probability ratio between updated and sampling policy. Unit: ratio.",
    "policy/clip_low": "Share of tokens whose probability ratio was clipped from below. Unit: share.",
    "policy/clip_high": "Share of tokens whose probability ratio was clipped from above. Unit: share.",
}


def clipped_loss(batch: PolicyBatch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate of each token's ratio r = π(y_t)/π_old(y_t), with separate bounds (DAPO's clip-higher):

    -min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A), times the off-policy correction.
    """
    return _clipped((batch.logprobs - batch.old).exp(), batch, config)


def sequence_clipped_loss(batch: PolicyBatch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (Zheng et al. 2507.18071): the same surrogate of one ratio per sequence, its tokens' geometric mean,

    s_i = (π(y_i)/π_old(y_i))^(1/|y_i|) = exp(1/|y_i| Σ_t log r_t), so that a sequence is clipped as a whole. Its bounds
    are far narrower than a token's: the paper has clip_low 3e-4 and clip_high 4e-4.
    """
    log_ratio = batch.logprobs - batch.old
    means = log_ratio.new_zeros(_count(batch.sequence))  # [S]
    means = means.index_add(0, batch.sequence, log_ratio / _lengths(batch.sequence))
    return _clipped(means.exp()[batch.sequence], batch, config)


def _clipped(ratio: Tensor, batch: PolicyBatch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    least, most = 1 - config.clip_low, 1 + config.clip_high
    surrogate = (ratio * batch.advantages).minimum(ratio.clamp(least, most) * batch.advantages)
    ratio = ratio.detach()
    return -surrogate * batch.importance_weights, {
        "policy/ratio_mean": ratio.sum(),
        "policy/clip_low": ((ratio < least) & (batch.advantages < 0)).sum(),
        "policy/clip_high": ((ratio > most) & (batch.advantages > 0)).sum(),
    }


# ---- aggregations ----


def _count(sequence: Tensor) -> int:
    return int(sequence[-1]) + 1 if len(sequence) else 0


def _lengths(sequence: Tensor) -> Tensor:
    """The number of tokens of each token's sequence. [M] -> [M]"""
    return sequence.bincount()[sequence]


# Every token counts alike: the mean over the batch's tokens (DAPO's correction of GRPO's 1/|y_i|).
TOKEN_MEAN = Aggregation(lambda losses, sequence: losses.sum(), lambda lengths, limit: sum(lengths))
# Dr. GRPO (2503.20783): sums over tokens, divided by a constant length: a token counts alike in long and short samples,
# and in batches of long and short ones.
CONSTANT_LENGTH = Aggregation(lambda losses, sequence: losses.sum(), lambda lengths, limit: len(lengths) * limit)
# Every sequence counts alike: the mean over sequences of the mean over their tokens.
SEQUENCE_MEAN = Aggregation(
    lambda losses, sequence: (losses / _lengths(sequence)).sum(), lambda lengths, limit: len(lengths)
)
