"""Training-time test: attention over the true text and over a head's own guesses, and the passes of MTP heads.

Axes: N sequences, L padded length, T bases, K key-value heads, D head size, H hidden size, M rows of a position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from forerun.drafters.mtp import MtpHead

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


def unroll_mtp(
    head: MtpHead, tokens: Tensor, features: Tensor, scored: Tensor, depth: int, targets: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Training-time test. Per draft position: the policy's last hidden states, and the head's, [M, H] each.

    Args:
        tokens: [N, L]. features: [N, L, H]. scored: [N, L], entry r: token r + 1 belongs to the completion.
        targets: [N, L, D], returned in the place of `features`.
    """
    targets = features if targets is None else targets
    length, layers = tokens.shape[1], len(head.layers)
    positions = torch.arange(length, device=tokens.device)[None]
    hidden, slots, begin, results = features, UnrollPass(), 0, []
    for j in range(depth):
        last = length - 2 - j  # bases beyond it have no next token
        if j >= layers and begin == 0:  # guesses begin at bases that rounds can start from
            begin = max(0, int(scored.any(0).float().argmax()) - 1)
            hidden, slots.first = hidden[:, begin:], begin
        if last < begin:
            break
        if j < layers:
            slots = UnrollPass()
        shift = max(0, j - layers + 1)
        bases = last + 1 - begin
        hidden = head.step(
            min(j, layers - 1),
            tokens[:, begin + 1 + j : last + 2 + j],
            hidden[:, :bases],
            positions[:, begin + shift : last + 1 + shift],
            slots,
        )
        rows = scored[:, begin + 1 : last + 2] & scored[:, begin + 1 + j : last + 2 + j]
        results.append((targets[:, begin + 1 + j : last + 2 + j][rows], hidden[rows]))
    return results
