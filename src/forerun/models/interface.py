"""A pass over cache rows as Transformers' modules see it: a cache, a mask, an attention function.

A module hands its keys and values to the cache and gets back all that its rows have. Which of them a token may see is
the module's own rule (windows, chunks, whatever it composes), evaluated at the rows' own positions. So modules with an
attention of their own run like those of the attention interface.
Axes: B rows of the pass, n tokens per row, L places, H query heads, K key-value heads, D head size (of a value, E).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from forerun.errors import UserError
from forerun.models.cache import SlotPass, causal_attention, folded_attention

ATTENTION = "forerun_slots"
LAYER_ATTENTION = "forerun_layer"  # of a decoder layer that runs alone, as in a drafter
_running: ContextVar[tuple[SlotPass, bool]] = ContextVar("running")  # the pass, and whether its causal mask may be None


@contextmanager
def attending(model: Any, slots: SlotPass) -> Iterator[PassCache]:
    """Context in which the model runs over cache rows; outside it keeps its own attention (the learner's)."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    token = _running.set((slots, model._supports_attention_backend))
    config._attn_implementation = ATTENTION
    try:
        yield PassCache(slots)
    finally:
        config._attn_implementation = before
        _running.reset(token)


class PassCache(Cache):
    """The cache that a model's forward gets, for one pass."""

    def __init__(self, slots: SlotPass) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self._written: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys [B, K, n, D] and values [B, K, n, E]; returns all of the rows, [B, K, L, D or E]."""
        if layer_idx in self._written:
            raise UserError(f"layer {layer_idx} attends twice in one forward, and would overwrite its own cache")
        self._written.add(layer_idx)
        return self.slots.store(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.slots.end - self.slots.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.slots.end, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self.slots.fresh

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.slots.states.get(("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        return self.slots.states.convolve(("conv", layer_idx, state_idx), conv_states, conv_kernel_size)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.slots.states.get(("recurrent", layer_idx, state_idx))

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return self.slots.states.put(("recurrent", layer_idx, state_idx), recurrent_states)


def slot_mask(
    *,
    mask_function: Callable[..., Tensor],
    dtype: torch.dtype = torch.float32,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: object,  # sizes, which the pass knows, and what other attentions want
) -> Tensor | None:  # [B or 1, 1, n, L], added to the scores
    """Transformers' mask interface: the module's own rule `mask_function(row, head, query, key position)`."""
    slots, may_skip = _running.get()
    if slots.fresh and may_skip and allow_is_causal_skip and (local_size is None or slots.tokens < local_size):
        return None  # nothing but causal: the attention function needs no mask for that
    at, branches = slots.seen()
    queries = slots.positions[:1] if slots.fresh and may_skip else slots.positions
    rows = torch.arange(len(queries), device=at.device)[:, None, None, None]
    seen = mask_function(rows, torch.zeros_like(rows[:1]), queries[:, None, :, None], at[:, None])
    seen = seen & branches[:, None]
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, n, D]
    key: Tensor,  # [B, K, L, D]
    value: Tensor,  # [B, K, L, E]
    attention_mask: Tensor | None,  # [B or 1, 1 or H, n, L]
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [H], attention sinks
    **_: object,  # Transformers hands every attention function what any of them may want
) -> tuple[Tensor, None]:  # [B, n, H, E]
    """Transformers' attention interface."""
    if attention_mask is None and (softcap is not None or s_aux is not None or key.shape[2] != query.shape[2]):
        if key.shape[2] != query.shape[2]:
            raise UserError(f"{type(module).__name__} hands its attention no mask")
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        attention_mask = torch.zeros(later.shape, dtype=query.dtype, device=query.device)
        attention_mask = attention_mask.masked_fill_(later, torch.finfo(query.dtype).min)[None, None]
    if attention_mask is None:
        out = causal_attention(query, key, value, scaling)
    else:
        mask = _folded(attention_mask, query.shape[1], key.shape[1])
        out = folded_attention(query, key, value, mask, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def layer_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, n, D]
    key: Tensor,  # [B, K, n, D]
    value: Tensor,  # [B, K, n, E]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slots: Any = None,  # what attends: a `SlotPass`, or the `UnrollPass` of a drafter's training
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:  # [B, n, H, E]
    """The same for a decoder layer that its caller gives the pass as `slots=`, without a cache or a mask."""
    if slots is None or s_aux is not None:
        why = "it does not hand keyword arguments to its attention" if slots is None else "it uses attention sinks"
        raise UserError(f"{type(module).__name__} cannot run in a drafter: {why}; use speculation.method=eagle3")
    layer: Any = module.layer_idx
    return slots.attend(int(layer), query, key, value, scaling, sliding_window, softcap), None


def _folded(mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    """A mask [B, 1 or H, n, L] for `folded_attention`: [B, 1 or K, (H/K)·n, L]."""
    if mask.shape[1] == 1:
        return mask.repeat(1, 1, heads // kv_heads, 1)
    return mask.reshape(mask.shape[0], kv_heads, -1, mask.shape[3])


AttentionInterface.register(ATTENTION, slot_attention)
AttentionInterface.register(LAYER_ATTENTION, layer_attention)
AttentionMaskInterface.register(ATTENTION, slot_mask)
