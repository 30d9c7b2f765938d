"""What training needs of a head, whichever drafter it belongs to: `training/heads.py` trains any `TrainableHead`.

Axes: N sequences, L padded length, T auxiliary layers, J depth, H hidden, D draft vocabulary, M rows of a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from forerun.models import Policy


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """One forward of the policy, detached: what the head reads, and the distributions that it is trained on."""

    tokens: Tensor  # [N, L]
    features: Tensor  # [N, L, T·H], auxiliary hidden states
    log_p: Tensor  # [N, L, D], entry r: the policy's distribution of token r + 1; D = 0: `features` give it
    scored: Tensor  # [N, L] bool, entry r: token r + 1 belongs to the completion

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, self.features, self.log_p, self.scored))


def scored_bases(scored: Tensor, j: int) -> Tensor:
    """Where rounds can start whose draft j is compared: bases t with the scored entries t+1 and t+1+j. [N, L] bool"""
    return F.pad(scored[:, 1:], (0, 1)) & F.pad(scored[:, 1 + j :], (0, 1 + j))


class TrainableHead(nn.Module):
    """Base class of heads that training-time test trains. All parameters are trained."""

    config: Any  # `layers`: auxiliary layers that it reads, `aux_width`: hidden size of each
    drafts_all_tokens: bool = False  # the whole vocabulary: the policy's rows are too long to be kept

    @property
    def vocabulary(self) -> Tensor:
        """Target ids that it drafts, ascending. [D]"""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the states that it feeds on: [..., H] -> [..., D]"""
        raise NotImplementedError

    def unroll(self, policy: Policy, teacher: TeacherBatch, depth: int) -> list[Tensor]:
        """Training-time test: per draft position j the states [M_j, H] of its `scored_bases`, which `logits` reads.

        Base t pairs hidden state t with token t+1, so draft j is compared with the policy's row t+1+j.
        """
        raise NotImplementedError

    def attach(self, policy: Policy) -> None:
        """Read the modules of `policy` from here on. Default: the head reads none."""

    def detached(self) -> Self:
        """The same parameters without modules of a policy, to be sent to a worker, which will `attach` it."""
        return self

    def gather_shared(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Read `gather` of the policy's output head, which is sharded, until the next `attach`."""
