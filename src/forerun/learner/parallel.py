"""Rows of each rank of a sharded learner, and the collectives beyond FSDP2's.

Every rank runs its own rows. A loss that is a sum over tokens divided by the tokens of the whole batch, on whichever
rank they are, has gradients that add up to those of one rank, so the update depends neither on the number of ranks nor
on the split. FSDP2 adds them up (`fsdp.py`). All ranks must call in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def split_rows(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Rows of each rank, in ascending order: the longest first, each to the rank that has the fewest tokens so far.

    The fullest rank has at most 4/3 of the tokens that the best split would give it (Graham 1969). The same on every
    rank that knows the lengths; among equals the lower row and the lower rank come first.
    """
    rows: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = tokens.index(min(tokens))
        rows[rank].append(i)
        tokens[rank] += lengths[i]
    return [sorted(part) for part in rows]


def all_reduce_max(number: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest of the ranks' numbers, e.g. of micro-batches, or of flags that one of them has raised."""
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (a DTensor); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank, which all must ask for; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those of each device mesh, in order: with tensor parallelism some are split over it and others are not."""
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(found.values())


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their common norm is at most `limit`. Returns the norm before."""
    meshes = by_mesh([p for p in parameters if p.grad is not None])
    if len(meshes) <= 1:
        return float(whole(nn.utils.clip_grad_norm_(parameters, limit)))
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in meshes]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm
