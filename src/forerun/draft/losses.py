"""What a drafter learns from: the policy's own distribution, detached. Losses and the acceptance they buy, by position.

Axes: M positions, D draft vocabulary. `log_p` is the policy's log-probability of the draft vocabulary's tokens, *not*
renormalised: what lies outside the draft vocabulary is lost acceptance, and the numbers here say so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FADE = 3.0  # η of the LK hybrid


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Probability that a sampled draft survives: Σ min(p, q) = 1 - TV(p, q). [M, D], [M, D] -> [M]"""
    return torch.minimum(log_p.exp(), log_q.exp()).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p' || q) with p' renormalised over the draft vocabulary, where q lives. [M]"""
    inside = torch.log_softmax(log_p, dim=-1)  # rows of log p renormalise to themselves
    return (inside.exp() * (inside - log_q)).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - Σ min(p, q): the rejection probability itself. [M]"""
    return 1 - acceptance(log_p, log_q)


def lk_hybrid(log_p: Tensor, log_q: Tensor) -> Tensor:
    """λ·KL + (1 - λ)·TV with λ = exp(-η·α), α detached (2602.23881): KL while drafts are poor, then TV."""
    weight = torch.exp(-FADE * acceptance(log_p, log_q).detach())
    return weight * forward_kl(log_p, log_q) + (1 - weight) * total_variation(log_p, log_q)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"lk": lk_hybrid, "kl": forward_kl, "tv": total_variation}
