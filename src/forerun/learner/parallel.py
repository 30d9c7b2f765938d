"""What the ranks of a data-parallel learner share: the rows, one normaliser, the sum of the gradients.

Every rank runs its own rows. A loss that is a sum over tokens divided by the tokens of the whole batch, on whichever
rank they are, has gradients that add up to those of one rank, so the update depends neither on the number of ranks nor
on the split. All ranks must call in the same order. A module that every rank holds whole has its gradients summed here
(`sum_gradients`); what follows the sum (clipping, moments, stochastic rounding) then sees the same numbers everywhere
and needs no communication. A policy whose parameters are sharded is FSDP2's to sum (`shard.py`).
Left out: overlap of communication with the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 24  # float32 gradients per message: 64 MiB beside the gradients themselves


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


def sum_over_ranks(
    numbers: Sequence[float], group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> list[float]:
    """Sums over the ranks, in float64: tokens for the normaliser, the sums behind the metrics.

    Args:
        device: one that the group's backend can send from; None: the CPU (gloo).
    """
    total = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return [float(x) for x in total]


def most_over_ranks(number: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest of the ranks' numbers: micro-batches that all must run, or whether one of them has seen something."""
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (a DTensor); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank, which all must ask for; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replace every gradient by its sum over the ranks, bit for bit the same on all of them.

    A rank without rows takes part with zeros. A parameter that has no gradient on any rank keeps none, so that the
    optimizer leaves it alone as one rank would.

    Args:
        parameters: in the same order on every rank; those of `MasterOptimizer.masters`.
    """
    found = [float(p.grad is not None) for p in parameters]
    device = parameters[0].device if parameters else None
    holders = sum_over_ranks(found, group, device)
    shared = [p for p, count in zip(parameters, holders, strict=True) if count]
    for bucket in _buckets(shared):
        flat = torch.cat([_gradient(p).flatten() for p in bucket])
        dist.all_reduce(flat, group=group)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = _gradient(parameter).copy_(part.view_as(parameter))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours of at most `BUCKET` elements together; a larger parameter stands alone."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
