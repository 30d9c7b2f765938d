"""Truncated sampling (top-k, top-p, min-p) as a mask on the target's logits: removed tokens get -inf.

The acceptance rules then verify against the truncated distribution: emitted tokens follow it and reported
log-probabilities are its own. Drafters need not know; a removed draft token is rejected. The order is that of
Transformers' logits processors: temperature, top-k, top-p, min-p. Ties with the last token of top-k are kept.

Not supported: training on truncated samples; a learner would have to repeat the cuts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.errors import UserError

_ROWS = 64  # sorted at once


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which part of a distribution is sampled; by default all of it.

    top_k keeps the k likeliest tokens (0: all); top_p the fewest likeliest ones with a mass of at least p (Holtzman et
    al. 1904.09751); min_p those at least p times as likely as the likeliest (Nguyen et al. 2407.01082).

    Raises:
        UserError: a value is outside its range.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value, fits, span in (
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise UserError(f"{name}={value} cuts off no sensible part of a distribution; it must be {span}")

    def __bool__(self) -> bool:
        return self != EVERYTHING


EVERYTHING = Truncation()


def truncate(logits: Tensor, temperature: Tensor, cuts: Truncation) -> Tensor:
    """Mask rows [B, n, V] of sequences at `temperature` [B]; greedy ones (0) keep at least their argmax.

    Returns a new tensor of the same type, or `logits` itself where nothing is cut.
    """
    if not cuts:
        return logits
    scale = torch.where(temperature > 0, temperature, 1.0).repeat_interleave(logits.shape[1])
    out = logits.clone().flatten(0, 1)  # [B * n, V]
    for start in range(0, len(out), _ROWS):
        part = slice(start, start + _ROWS)
        out[part] = out[part].masked_fill(~_kept(out[part].float() / scale[part, None], cuts), -torch.inf)
    return out.view_as(logits)


def _kept(scaled: Tensor, cuts: Truncation) -> Tensor:
    """Which tokens of rows [m, V] are kept: [m, V] bool."""
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < cuts.top_k < scaled.shape[1]:
        kept = scaled >= scaled.topk(cuts.top_k, dim=1).values[:, -1:]
    if cuts.top_p < 1:
        ordered, order = scaled.masked_fill(~kept, -torch.inf).sort(dim=1, descending=True, stable=True)
        p = ordered.softmax(1)
        enough = p.cumsum(1) - p >= cuts.top_p  # likelier tokens already have the mass
        kept &= ~torch.zeros_like(kept).scatter(1, order, enough)
    if cuts.min_p > 0:
        kept &= scaled >= scaled.amax(1, keepdim=True) + torch.tensor(cuts.min_p).log().to(scaled)
    return kept
