"""Sequence packing: (prompt, completion) sequences side by side in one row, none of which sees another.

Positions restart with every sequence. Where they do, Transformers makes the attention mask block-diagonal
(`masking_utils.find_packed_sequence_indices`; only without an attention mask and without a cache), for full and
sliding windows. Under that mask every token still pays for the whole row, and sums run in another order than alone. So
the model's own attention, sdpa or eager, is handed one sequence after the other (`by_sequence`), each with its own part
of the mask: a row costs what its sequences cost, and each of them is computed as if it stood alone. What carries a
state from token to token by other means, a state-space layer or a convolution, knows nothing of it: `require_packing`
tests the model and refuses.
Flash attention takes sequences of any length at once and is left unchanged.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.logprobs import completion_logits, packed_batch, token_batch

LEAK = 0.05  # of what a sequence would change if it saw its neighbour; bfloat16 rounds to less
BY_SEQUENCE = {"sdpa": "sdpa_by_sequence", "eager": "eager_by_sequence"}  # attention implementations


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put sequences into rows of at most `capacity` tokens (a longer one gets its own): first fit, longest first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def packed_microbatches(lengths: Sequence[int], tokens: int) -> list[list[list[int]]]:
    """Micro-batches of one packed row of sequence indices: of at most `tokens` tokens, or of one sequence."""
    return [[row] for row in pack(lengths, tokens)]


def require_packing(policy: Policy, tokens: int) -> None:
    """Have the policy attend sequence by sequence, and try it on packed rows.

    Args:
        tokens: of the rows that will be packed, at most.

    Raises:
        UserError: it takes no positions, its sequences see their neighbours, or its layers count from the row's start.
    """
    name = type(policy.model).__name__
    if tokens > (longest := _longest_row(policy.model.config.get_text_config())):
        raise UserError(
            f"train.packing=true with train.microbatch_tokens={tokens}: {name} scales its queries by their place in a "
            f"row, which has several sequences; set train.microbatch_tokens to {longest} or less, or packing to false"
        )
    if "position_ids" not in inspect.signature(policy.model.forward).parameters:
        raise UserError(f"train.packing=true needs a model that takes positions, and {name} does not; set it to false")
    attend_by_sequence(policy.model)
    try:
        seen = packing_leak(policy.model, policy.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of modelling code that reads the mask itself
        raise UserError(
            f"train.packing=true needs a model whose attention is that of Transformers' interface, and {name} fails on "
            f"packed rows ({type(error).__name__}: {error}); set it to false"
        ) from error
    if not seen < LEAK:
        raise UserError(
            f"train.packing=true needs a model whose packed sequences do not see each other; in {name} with the "
            f"attention implementation '{policy.model.config._attn_implementation}' a neighbour changes the logits by "
            f"{seen:.0%} of what a prefix does; set it to false"
        )


def _longest_row(config: Any) -> float:
    """Tokens of a row up to which Llama 4 does not scale its queries, by their place in the row."""
    return config.floor_scale - 1 if getattr(config, "attn_temperature_tuning", False) else float("inf")


@torch.no_grad()
def packing_leak(model: Any, device: torch.device) -> float:
    """How much a packed sequence sees of its neighbour: 0 nothing, 1 as if the one before were its prefix.

    The largest change of any logit against the sequence alone, over the change that the prefix makes.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    source = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, vocabulary, (2, 16), generator=source).tolist()
    one, two = (first[:1], first[1:]), (second[:1], second[1:])
    alone = completion_logits(model, token_batch([two], device)).float()
    prefixed = completion_logits(model, token_batch([(first + second[:1], second[1:])], device)).float()
    packed = completion_logits(model, packed_batch([[one, two, one]], device)).float()
    seen = float((packed.split(len(alone))[1] - alone).abs().max())
    return seen / max(float((prefixed - alone).abs().max()), 1e-12)


# ---- attention, one sequence after the other ----


def attend_by_sequence(model: Any) -> None:
    """Have a model attend so wherever a row is packed; elsewhere, and with other kernels, it attends as it did."""
    config = model.config.get_text_config()
    config._attn_implementation = BY_SEQUENCE.get(config._attn_implementation, config._attn_implementation)


class RowMask:
    """The mask of one row of a pass, in the place of Transformers', which would be as wide as long: made in parts."""

    def __init__(self, make: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
        """`make`, called with `arguments`, makes all of it."""
        self._make = make
        self._arguments = arguments
        self._parts: dict[tuple[int, int, int, int], Tensor] = {}
        self._sequences: list[tuple[int, int]] = []

    def sequences(self, position_ids: Tensor | None) -> list[tuple[int, int]]:
        """(first place, first place after it) of each; the same for every layer. `position_ids`: [1, L]."""
        if not self._sequences:
            places = [] if position_ids is None else ((position_ids[0].diff() != 1).nonzero()[:, 0] + 1).tolist()
            self._sequences = list(zip([0, *places], [*places, self._arguments["q_length"]], strict=True))
        return self._sequences

    def part(self, start: int, end: int) -> Tensor:
        """Of queries and keys start .. end - 1. [1, 1, end - start, end - start]"""
        return self._part(start, end, start, end)

    def causal(self, start: int, end: int) -> bool:
        """Whether a sequence is masked by causality alone: its last token sees the first, no window cuts it short."""
        return bool(self._part(end - 1, end, start, start + 1))

    def _part(self, start: int, end: int, first: int, last: int) -> Tensor:
        found = self._parts.get(place := (start, end, first, last))
        if found is None:
            lengths = {"q_length": end - start, "q_offset": start, "kv_length": last - first, "kv_offset": first}
            found = self._parts[place] = self._make(**self._arguments | lengths)
        return found


def lazily(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` (a mask function of Transformers), which leaves the mask of a single row to `RowMask`."""

    def mask(**arguments: Any) -> Any:
        packed = not arguments.get("allow_is_causal_skip", True) and arguments["q_length"] == arguments["kv_length"]
        return RowMask(make, arguments) if packed and arguments["batch_size"] == 1 else make(**arguments)

    return mask


def by_sequence(attend: Callable[..., tuple[Tensor, Tensor | None]], fused: bool) -> Callable[..., Any]:
    """`attend` (an attention function of Transformers), called for each sequence of a packed row.

    Args:
        fused: it is causal without a mask, and gets none where a sequence is masked by nothing else.
    """

    def attention(
        module: Any,
        query: Tensor,  # [N, heads, L, D]
        key: Tensor,  # [N, key/value heads, L, D]
        value: Tensor,
        attention_mask: Tensor | RowMask | None,
        position_ids: Tensor | None = None,  # [N, L]
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, RowMask):
            return attend(module, query, key, value, attention_mask, position_ids=position_ids, **rest)
        outputs = []
        for start, end in attention_mask.sequences(position_ids):
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            bare = fused and attention_mask.causal(start, end)
            outputs.append(attend(module, q, k, v, None if bare else attention_mask.part(start, end), **rest)[0])
        return torch.cat(outputs, dim=1), None

    return attention


def _eager(module: Any, *arguments: Any, **words: Any) -> Any:
    """The attention that a model's own file defines, which is in plain operations."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **words)


AttentionInterface.register(BY_SEQUENCE["sdpa"], by_sequence(sdpa_attention_forward, fused=True))
AttentionInterface.register(BY_SEQUENCE["eager"], by_sequence(_eager, fused=False))
AttentionMaskInterface.register(BY_SEQUENCE["sdpa"], lazily(sdpa_mask))
AttentionMaskInterface.register(BY_SEQUENCE["eager"], lazily(eager_mask))
