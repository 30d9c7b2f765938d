"""Draft trees in the batch loop: the cache places of their nodes, and what is kept of them after verification.

A tree of k nodes runs as one pass of k+1 tokens: the root, which is the newest token, at place start, and the node of
slot j at place start + 1 + j. Its position is start + its depth, and it sees the text, the root and its ancestors.
Rows of fewer nodes are padded with children of the root that no node attends to.
Axes: B rows, k slots, A depth of the batch's deepest node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forerun.acceptance.chain import drafted
from forerun.models.cache import SlotCache, TreePlaces
from forerun.types import Draft


def lineage(draft: Draft) -> Tensor:  # [B, k+1, k+1] bool
    """Whether row i (last axis) is row j or one of its ancestors; row 0 is the root, row j+1 the node of slot j."""
    assert draft.parents is not None
    parents = torch.nn.functional.pad(draft.parents.where(drafted(draft), -1) + 1, (1, 0))  # [B, k+1]
    above = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    seen = torch.zeros(*parents.shape, parents.shape[1], dtype=torch.bool, device=parents.device)
    for _ in range(parents.shape[1]):
        seen.scatter_(2, above[:, :, None], True)
        if not bool(above.any()):
            break
        above = parents.gather(1, above)
    return seen


def tree_places(draft: Draft, starts: Tensor) -> TreePlaces:
    """Places of the pass over root and nodes of rows that start at `starts` [B]."""
    seen = lineage(draft)
    return TreePlaces(starts[:, None] + seen.sum(2) - 1, seen)


def depths(draft: Draft) -> Tensor:  # [B]
    """Depth of every row's deepest node, 0 without nodes; of a chain, its length."""
    if draft.parents is None or draft.tokens.shape[1] == 0:
        return draft.lengths
    below = lineage(draft).sum(2)[:, 1:] - 1
    return below.where(drafted(draft), 0).amax(1)


def keep_path(cache: SlotCache, starts: Tensor, path: Tensor) -> None:
    """Move the accepted slots path [B, A] (-1: none), node by node, to the places that follow the root's."""
    rows, step = (path > torch.arange(path.shape[1], device=path.device)).nonzero(as_tuple=True)
    first = starts[rows] + 1
    cache.move(rows, first + path[rows, step], first + step)


def along_path(features: Tensor, path: Tensor) -> Tensor:
    """Of features [B, k+1, F] those of the root and the accepted path [B, A]: [B, A+1, F], arbitrary beyond its end."""
    rows = torch.nn.functional.pad(path + 1, (1, 0))  # the root's row is 0, and so is the padding's
    return features.gather(1, rows[:, :, None].expand(-1, -1, features.shape[2]))
