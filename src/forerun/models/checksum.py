"""A checksum of named tensors in one pass over their bytes, computed where the tensors are: equal on every device.

The bytes of a tensor are read as words of 64 bits (the last one padded with zeros), in rows of `COLUMNS`:

    Σ_i (w_i + (w_i >> 32)) · column[i mod COLUMNS] · row[i div COLUMNS]   modulo 2^64,

weighted by hashes of the place, made odd. A change of one word always shows: odd factors lose nothing. Words that
change places show unless their weights differ by a multiple of 2^33, which has a chance of 2^-32; the shift is there
because a difference in the upper half of a word alone would else be multiplied out of the 64 bits.
It detects faults. Not supported: an adversary, who could make another state with the same checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from forerun.acceptance.random import mix_bits

COLUMNS = 4096
BLOCK_ROWS = {"cpu": 16, "cuda": 4096}  # a block stays in a core's cache; a GPU is given enough to do


def checksum(state: Mapping[str, Tensor]) -> str:
    """16 hex digits over names, shapes, types and bits. The order of the tensors does not matter."""
    total = 0
    for name, tensor in state.items():
        label = f"{name} {tuple(tensor.shape)} {tensor.dtype} {weighted_sum(tensor)}"
        total += int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")
    return f"{total % 2**64:016x}"


@torch.no_grad()
def weighted_sum(tensor: Tensor, block_rows: int | None = None) -> int:
    """The sum of the module's docstring. `block_rows`: rows taken at a time, which does not change it."""
    words = _words(tensor)
    whole = len(words) // COLUMNS * COLUMNS
    blocks = words[:whole].view(-1, COLUMNS).split(block_rows or BLOCK_ROWS.get(words.device.type, 16))
    sums = torch.cat([_row_sums(rows) for rows in (*blocks, words[None, whole:])])  # [rows]
    return int((sums * _odd_hashes(len(sums), 1, words.device)).sum())


def _row_sums(rows: Tensor) -> Tensor:
    """[n, c] int64, c at most `COLUMNS`. -> [n]"""
    folded = (rows >> 32).add_(rows)
    return folded.mul_(_columns(rows.device)[: rows.shape[1]]).sum(-1)


def _words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as 64-bit words. [W] int64"""
    values = tensor.detach().contiguous()
    data = values.as_strided((values.numel(),), (1,)).view(torch.uint8)  # also one element, which may keep any stride
    if len(data) % 8 or data.data_ptr() % 8:
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))  # copies
    return data.view(torch.int64)


@cache
def _columns(device: torch.device) -> Tensor:
    return _odd_hashes(COLUMNS, 2, device)


def _odd_hashes(count: int, stream: int, device: torch.device) -> Tensor:
    """[count] int64"""
    return mix_bits(mix_bits(torch.arange(count, device=device) + (stream << 40))) | 1
