"""Inputs of acceptance rules: random numbers, siblings drawn as each tree rule expects them, parts of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from forerun.acceptance.random import inverse_cdf_log
from forerun.types import Draft, VerifyInput

ALMOST_ONE = 1 - 2.0**-53
DRAWN = {"walk": "top", "rrs": "sampled", "best_sampled": "best", "traversal": "sampled"}  # siblings each rule is for
Record = TypeVar("Record", Draft, VerifyInput)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(inputs: VerifyInput, part: Tensor) -> VerifyInput:
    """Some sequences of a batch."""
    draft = _mapped(inputs.draft, lambda value: value[part], skip="vocabulary")
    return replace(_mapped(inputs, lambda value: value[part], skip="draft"), draft=draft)


def on_device(inputs: VerifyInput, device: str) -> VerifyInput:
    draft = _mapped(inputs.draft, lambda value: value.to(device))
    return replace(_mapped(inputs, lambda value: value.to(device), skip="draft"), draft=draft)


def _mapped(record: Record, change: Callable[[Tensor], Tensor], skip: str = "") -> Record:
    values = {field.name: getattr(record, field.name) for field in fields(record) if field.name != skip}
    return replace(record, **{name: change(value) for name, value in values.items() if value is not None})


def drawn_columns(q: Tensor, parents: Tensor, drawn: str, u: Tensor) -> Tensor:
    """A column per slot [B, k] from the rows q [B, k+1, D]: "sampled", "best" or "top", as `drawn_trees` has it."""
    batch, k = parents.shape
    left, columns = q.clone(), torch.zeros(batch, 0, dtype=torch.int64)
    every = torch.arange(batch)
    for slot in range(k):
        rows = left[every, parents[:, slot] + 1]
        sampled, best = inverse_cdf_log(rows, u[:, slot]), rows.argmax(1)
        first = (parents[:, :slot] != parents[:, slot, None]).all(1)
        fixed = torch.tensor(drawn == "top").expand(batch) | (first & (drawn == "best"))
        chosen = torch.where(fixed, best, sampled)
        left[every, parents[:, slot] + 1, chosen] = -torch.inf
        columns = torch.cat([columns, chosen[:, None]], 1)
    return columns
