"""Training-time test: attention over the true text and over a head's own guesses, and the passes of MTP heads.

Scores of many queries by all keys would grow with the square of the length. Queries are taken in blocks, each with the
keys that it may see, and a block's scores are computed again in the backward pass: memory grows with the length alone.
Axes: N sequences, L padded length, T bases, K key-value heads, D head size, H hidden size, M rows of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

KeysAndValues = tuple[Tensor, Tensor]
SCORE_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of the float32 scores of a block of queries
LAYER_BYTES = 2**28  # of what a pass keeps for its backward pass; of longer ones it is computed again


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
    rows, heads, bases, _ = query.shape
    limit = SCORE_BYTES.get(query.device.type, 2**24)
    size = max(1, limit // (4 * rows * heads * (context[0].shape[2] + len(own))))
    if size >= bases:
        return attend_directly(query, context, own, first, scale, window, softcap)
    blocks = []
    for start in range(0, bases, size):
        low = 0 if window is None else max(0, first + start + len(own) - window + 1)
        blocks.append(Block(slice(start, min(start + size, bases)), low, first, scale, window, softcap))
    tensors = (query, *context, *(x for pair in own for x in pair))
    result: Tensor = _InBlocks.apply(blocks, *tensors)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, slots=True)
class Block:
    """Some bases, and how their queries attend."""

    bases: slice  # counted from `first`
    low: int  # the first key that they see
    first: int
    scale: float | None
    window: int | None
    softcap: float | None

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What it reads of query, keys and values of the text, and keys and values of each later pass."""
        text = slice(self.low, self.first + self.bases.stop)
        return [x[:, :, text if i in (1, 2) else self.bases] for i, x in enumerate(tensors)]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        """Of its views."""
        first = self.first + self.bases.start - self.low
        pairs = list(zip(own[::2], own[1::2], strict=True))
        return attend_directly(query, (keys, values), pairs, first, self.scale, self.window, self.softcap)


class _InBlocks(torch.autograd.Function):
    """`attend_directly`, block after block, whose scores the backward pass computes again."""

    @staticmethod
    def forward(ctx: Any, blocks: list[Block], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.blocks = blocks
        ctx.precision = torch.is_autocast_enabled(device := tensors[0].device.type), torch.get_autocast_dtype(device)
        query, _, values = tensors[:3]
        out = values.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[3])
        for block in blocks:
            out[:, block.bases] = block.attend(*block.views(tensors))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        sums = [torch.zeros_like(x) for x in tensors]
        enabled, dtype = ctx.precision
        for block in ctx.blocks:
            views = [x.detach().requires_grad_() for x in block.views(tensors)]
            with torch.enable_grad(), torch.autocast(tensors[0].device.type, dtype=dtype, enabled=enabled):
                out = block.attend(*views)
            for total, part in zip(
                block.views(sums), torch.autograd.grad(out, views, gradients[0][:, block.bases]), strict=True
            ):
                total += part
        return None, *sums


def attend_directly(
    query: Tensor,
    context: KeysAndValues,
    own: list[KeysAndValues],
    first: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same with the scores of all queries at once."""
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


def compute(keeps_bytes: int, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), once more in the backward pass where that would have to keep too much."""
    if keeps_bytes <= LAYER_BYTES:
        return function(*arguments)
    result: T = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Of pass 0. query: [N, heads, T, D]. key, value: [N, K, T, D]. -> [N, T, heads, D]"""
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


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
                return causal_attention(query, key, value, scale)
        else:
            bases = query.shape[2]
            self.own = [(k[:, :, :bases], v[:, :, :bases]) for k, v in self.own] + [(key, value)]
        return unrolled_attention(query, self.context, self.own, self.first, scale, window, softcap)
