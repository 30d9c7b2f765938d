"""Training-time test: attention over the true text and over a head's own guesses, and the passes of MTP heads.

Axes: N sequences, L padded length, T bases, K key-value heads, D head size, H hidden size, M rows of a position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

KeysAndValues = tuple[Tensor, Tensor]


def unrolled_attention(
    query: Tensor,
    context: KeysAndValues,
    own: list[KeysAndValues],
    first: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of pass r = len(own): the query of base t has position t + r.

    It sees the true text up to t, and its own base's keys of passes 1 .. r.

    Args:
        query: [N, heads, T, D], of bases first .. first + T - 1.
        context: [N, K, L, D] each, of the true text, which pass 0 ran. own: [N, K, T, D] each, of later passes.

    Returns:
        [N, T, heads, D]
    """
    group, length = query.shape[1] // context[0].shape[1], context[0].shape[2]
    keys, values = (x.repeat_interleave(group, dim=1) for x in context)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ keys.transpose(2, 3)).to(wide)  # [N, heads, T, L]
    mine = [(query * k.repeat_interleave(group, dim=1)).sum(-1, keepdim=True).to(wide) for k, _ in own]
    scores = torch.cat([scores, *mine], dim=-1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = _seen(first, query.shape[2], length, len(own), window, query.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(values.dtype)
    out = weights[..., :length] @ values
    for i, (_, v) in enumerate(own):
        out = out + weights[..., length + i, None] * v.repeat_interleave(group, dim=1)
    return out.transpose(1, 2)


def _seen(first: int, bases: int, length: int, passes: int, window: int | None, device: torch.device) -> Tensor:
    """[T, L + passes] bool"""
    base = torch.arange(first, first + bases, device=device)[:, None]
    at = torch.arange(length, device=device)[None]
    seen = at <= base
    age = torch.arange(passes - 1, -1, -1, device=device).expand(bases, passes)  # of own keys, in positions
    mine = torch.ones_like(age, dtype=torch.bool)
    if window is not None:
        seen, mine = seen & (at > base + passes - window), age < window
    return torch.cat([seen, mine], dim=1)


@dataclass(slots=True)
class UnrollPass:
    """Attention of training-time test in place of a KV cache: a first, causal pass, then `unrolled_attention`."""

    first: int = 0  # base of the first query
    context: KeysAndValues | None = None  # [N, K, L, D], the first pass's
    own: list[KeysAndValues] = field(default_factory=list)  # [N, K, T, D] per later pass

    def attend(
        self,
        layer: int,
        query: Tensor,  # [N, heads, T, D]
        key: Tensor,  # [N, K, T, D]
        value: Tensor,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:  # [N, T, heads, D]
        """The interface of `SlotPass.attend`."""
        query, key = query.to(value.dtype), key.to(value.dtype)  # norms may have left them in float32 under autocast
        if self.context is None:
            self.context = key, value
            if softcap is None and (window is None or window >= query.shape[2]):
                grouped = query.shape[1] != key.shape[1]
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
                return out.transpose(1, 2)
        else:
            bases = query.shape[2]
            self.own = [(k[:, :, :bases], v[:, :, :bases]) for k, v in self.own] + [(key, value)]
        return unrolled_attention(query, self.context, self.own, self.first, scale, window, softcap)
