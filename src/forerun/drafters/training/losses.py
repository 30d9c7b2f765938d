"""Losses between the policy's distribution, detached, and the drafter's, and the acceptance they predict, by position.

Most losses read one draft position alone. Cross-entropy also reads the token that the policy sampled there, and the
end-to-end loss the probability that all drafts before it are accepted.
Axes: M rows, D draft vocabulary. `log_p` is the policy's log-probability of the draft vocabulary's tokens, *not*
renormalised: what is outside the draft vocabulary is lost acceptance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FADE = 3.0  # η of the LK hybrid


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Probability that a sampled draft is accepted: Σ min(p, q) = 1 - TV(p, q). [M, D], [M, D] -> [M]"""
    return torch.minimum(log_p.exp(), log_q.exp()).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p' || q) with p' renormalised over the draft vocabulary, where q lives; tokens without p' add 0. [M]"""
    inside = torch.log_softmax(log_p, dim=-1)  # rows of log p renormalise to themselves
    return torch.where(inside > -torch.inf, inside.exp() * (inside - log_q), 0.0).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - Σ min(p, q): the rejection probability itself. [M]"""
    return 1 - acceptance(log_p, log_q)


def lk_hybrid(log_p: Tensor, log_q: Tensor) -> Tensor:
    """λ·KL + (1 - λ)·TV with λ = exp(-η·α), α detached (2602.23881): KL while drafts are poor, then TV."""
    weight = torch.exp(-FADE * acceptance(log_p, log_q).detach())
    return weight * forward_kl(log_p, log_q) + (1 - weight) * total_variation(log_p, log_q)


def cross_entropy(log_q: Tensor, tokens: Tensor) -> Tensor:
    """-log q of the sampled token; 0 where the draft vocabulary lacks it. [M, D], [M] -> [M]

    Its mean over the policy's samples is -Σ p log q over the draft vocabulary: forward KL's gradient where all of p is
    inside, with the noise of one sample.

    Args:
        tokens: index into the draft vocabulary, -1: outside of it.
    """
    chosen = log_q.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
    return torch.where(tokens >= 0, -chosen, 0.0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"lk": lk_hybrid, "kl": forward_kl, "tv": total_variation}


def row_loss(name: str, log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    """A loss that looks at one position alone: lk, kl, tv or ce. [M, D], [M, D], [M] (see `cross_entropy`) -> [M]"""
    return cross_entropy(log_q, tokens) if name == "ce" else LOSSES[name](log_p, log_q)


def position_loss(
    name: str, log_p: Tensor, log_q: Tensor, tokens: Tensor, reached: Tensor
) -> tuple[Tensor, Tensor]:  # [M], [M]
    """Loss of every row of one draft position, and the probability that the row's draft is accepted.

    "e2e" is the end-to-end total variation of 2606.12370: 1 - Π_{i <= j} Σ min(p_i, q_i) at position j, so that one
    minus the loss, summed over a base's positions, is its expected number of accepted drafts, given that the policy's
    own tokens were drafted. Only there does `reached` carry a gradient.

    Args:
        name: lk, kl, tv, ce or e2e. log_p, log_q: [M, D]. tokens: [M], see `cross_entropy`.
        reached: [M], probability that all earlier drafts of the row's base are accepted; read by "e2e".
    """
    if name == "e2e":
        overlap = acceptance(log_p, log_q)
        return 1 - reached * overlap, overlap
    return row_loss(name, log_p, log_q, tokens), acceptance(log_p, log_q.detach())
