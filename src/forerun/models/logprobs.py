"""Log-probabilities of completions under the live policy: one padded forward, the head only where it is needed.

Rows are right-padded, so a causal model needs no mask: no real token ever attends to padding. Packed rows
(`learner/packing.py`) hold several sequences, separated by their positions.
Axes: N rows, L padded length, M completion tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[list[int], list[int]]  # prompt ids, completion ids


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Prompts with completions, padded. Entry m of `rows, columns, targets` is one completion token."""

    input_ids: Tensor  # [N, L] int64
    rows: Tensor  # [M] int64, row of each completion token
    columns: Tensor  # [M] int64, position whose output predicts it
    targets: Tensor  # [M] int64
    position_ids: Tensor | None = None  # [N, L] int64, restarting with each packed sequence; None: one sequence per row


def token_batch(pairs: Sequence[Pair], device: torch.device) -> TokenBatch:
    """Pad (prompt, completion) pairs; completion tokens are listed row by row, in order."""
    return replace(packed_batch([[pair] for pair in pairs], device), position_ids=None)


def packed_batch(rows: Sequence[Sequence[Pair]], device: torch.device) -> TokenBatch:
    """Lay the pairs of each row side by side; completion tokens are listed row by row, pair by pair, in order.

    Padding has position 0, each a sequence of its own. See `learner/packing.py`.
    """
    length = max(sum(len(prompt) + len(completion) for prompt, completion in row) for row in rows)
    input_ids, positions = torch.zeros(2, len(rows), length, dtype=torch.int64)
    index: tuple[list[int], list[int], list[int]] = [], [], []  # rows, columns, targets
    for n, row in enumerate(rows):
        start = 0
        for prompt, completion in row:
            end = start + len(prompt) + len(completion)
            input_ids[n, start:end] = torch.tensor(prompt + completion)
            positions[n, start:end] = torch.arange(end - start)
            index[0].extend([n] * len(completion))
            index[1].extend(range(start + len(prompt) - 1, end - 1))
            index[2].extend(completion)
            start = end
    at, columns, targets = (torch.tensor(x, dtype=torch.int64, device=device) for x in index)
    return TokenBatch(input_ids.to(device), at, columns, targets, positions.to(device))


@contextmanager
def head_sees(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within, the model's output head receives only the hidden states at (rows, columns): logits become [M, V].

    What a model does to its logits after the head (softcapping, scaling) still applies, whatever its class.
    """

    def select(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][rows, columns], *arguments[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(select, prepend=True)  # before it is split over ranks
    try:
        yield
    finally:
        handle.remove()


def completion_logits(model: Any, batch: TokenBatch) -> Tensor:
    """Logits that predict each completion token. [M, V], in the model's dtype."""
    packed = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    with head_sees(model, batch.rows, batch.columns):
        return model(input_ids=batch.input_ids, use_cache=False, **packed).logits


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target at `temperature` (0: of the unscaled distribution), differentiable.

    Args:
        logits: [M, V]. targets: [M].

    Returns:
        [M] float32
    """
    scaled = logits.float() if temperature in (0.0, 1.0) else logits.float() / temperature
    return -F.cross_entropy(scaled, targets, reduction="none")


@torch.no_grad()
def token_entropy(logits: Tensor, temperature: float, rows: int = 256) -> Tensor:
    """Entropy of each row in nats, a few rows at a time; what a logit of -inf excludes adds 0. [M, V] -> [M] float32"""
    parts = [torch.log_softmax(part.float() / (temperature or 1.0), dim=-1) for part in logits.split(rows)]
    return torch.cat([-(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1) for log_p in parts])


def microbatches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Split row indices into groups of at most `tokens` padded tokens (a longer row is one group), long rows first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
