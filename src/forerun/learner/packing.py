"""Sequence packing: several (prompt, completion) sequences side by side in one row, none of which sees another.

Positions restart with every sequence. Where they do, Transformers makes the attention mask block-diagonal
(`masking_utils.find_packed_sequence_indices`; only without an attention mask and without a cache), for full and
sliding windows, with the attention implementations sdpa and eager. What carries a state from token to token by other
means, a state-space layer or a convolution, knows nothing of it: `require_packing` tries the very model and refuses.
Rows hold up to `SEQUENCES` times the longest sequence: attention costs as much as the row is long, for every token.
Left out: variable-length kernels, which take all sequences as one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forerun.errors import UserError
from forerun.learner.forward import completion_logits, microbatches, packed_batch, token_batch
from forerun.models import Policy

SEQUENCES = 2  # longest sequences per row
LEAK = 0.05  # of what a sequence would change if it saw its neighbour; bfloat16 rounds to less


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put sequences into rows of at most `capacity` tokens (a longer one stands alone): first fit, longest first."""
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
    """Micro-batches of packed rows of sequence indices: at most `tokens` padded tokens each, or one row of one."""
    if not lengths:
        return []
    rows = pack(lengths, min(tokens, SEQUENCES * max(lengths)))
    return [[rows[r] for r in group] for group in microbatches([sum(lengths[i] for i in row) for row in rows], tokens)]


def require_packing(policy: Policy) -> None:
    """Try the policy on packed rows.

    Raises:
        UserError: it takes no positions, or its sequences see their neighbours.
    """
    name = type(policy.model).__name__
    if "position_ids" not in inspect.signature(policy.model.forward).parameters:
        raise UserError(f"train.packing=true needs a model that takes positions, and {name} does not; set it to false")
    seen = packing_leak(policy.model, policy.device)
    if not seen < LEAK:
        raise UserError(
            f"train.packing=true needs a model whose packed sequences do not see each other; in {name} with the "
            f"attention implementation '{policy.model.config._attn_implementation}' a neighbour changes the logits by "
            f"{seen:.0%} of what a prefix does; set it to false"
        )


@torch.no_grad()
def packing_leak(model: Any, device: torch.device) -> float:
    """How much a packed sequence sees of its neighbours: 0 nothing, 1 as if the one before were its prefix.

    The largest change of any logit against the sequence alone, over the change that the prefix makes.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    source = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, vocabulary, (2, 16), generator=source).tolist()
    one, two = (first[:1], first[1:]), (second[:1], second[1:])
    alone = completion_logits(model, token_batch([two], device)).float()
    prefixed = completion_logits(model, token_batch([(first + second[:1], second[1:])], device)).float()
    packed = completion_logits(model, packed_batch([[one, two], [two, one]], device)).float()
    places: tuple[Tensor, ...] = packed.split(len(alone))  # one, two, two, one
    seen = max(float((place - alone).abs().max()) for place in places[1:3])
    return seen / max(float((prefixed - alone).abs().max()), 1e-12)
