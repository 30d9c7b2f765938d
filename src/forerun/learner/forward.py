"""Log-probabilities of completions under the live policy: one padded forward, the head only where it is needed.

Rows are right-padded, so a causal model needs no mask: no real token ever attends to padding.
Axes: N rows, L padded length, M completion tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Prompts with completions, padded. Entry m of `rows, columns, targets` is one completion token."""

    input_ids: Tensor  # [N, L] int64
    rows: Tensor  # [M] int64, row of each completion token
    columns: Tensor  # [M] int64, position whose output predicts it
    targets: Tensor  # [M] int64


def token_batch(pairs: Sequence[tuple[list[int], list[int]]], device: torch.device) -> TokenBatch:
    """Pad (prompt, completion) pairs; completion tokens are listed row by row, in order."""
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for n, (prompt, completion) in enumerate(pairs):
        input_ids[n, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        rows += [n] * len(completion)
        columns += range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        targets += completion
    index = [torch.tensor(x, dtype=torch.int64, device=device) for x in (rows, columns, targets)]
    return TokenBatch(input_ids.to(device), *index)


@contextmanager
def head_sees(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within, the model's output head receives only the hidden states at (rows, columns): logits become [M, V].

    What a model does to its logits after the head (softcapping, scaling) still applies, whatever its class.
    """

    def select(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][rows, columns], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def completion_logits(model: Any, batch: TokenBatch) -> Tensor:
    """Logits that predict each completion token. [M, V], in the model's dtype."""
    with head_sees(model, batch.rows, batch.columns):
        return model(input_ids=batch.input_ids, use_cache=False).logits


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
    """Entropy of each row in nats, a few rows at a time. [M, V] -> [M] float32"""
    parts = [torch.log_softmax(part.float() / (temperature or 1.0), dim=-1) for part in logits.split(rows)]
    return torch.cat([-(log_p.exp() * log_p).sum(-1) for log_p in parts])


def microbatches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Split row indices into groups of at most `tokens` padded tokens (a longer row stands alone), long rows first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
