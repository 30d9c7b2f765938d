"""The drafts' temperature over the rollouts', learnt while drafting (`speculation.draft_temperature: auto`).

A drafted token stands with probability sum_v min(p_v, q_v) (2211.17192, corollary 3.6), and that sum is known exactly
for every temperature of q wherever the policy has judged a draft. So no temperature is tried out: on a grid of them the
overlap is computed on a few of a round's reached slots, averaged exponentially, and the best one drafts the next round.
Slot j is reached when the j drafts before it were accepted; the rows behind a rejection belong to a text that is not.

Losslessness. The heat of a round is a function of earlier rounds alone. Given all that happened in them, accepted or
rejected, in this row or another, a round draws its drafts, coins and last token from uniforms of its own (`round_keys`:
a new root, new keys) and from the q that it hands over, and then its tokens, continued by the policy, have the policy's
law for *whatever* heat it runs at; by induction over rounds so has the text. That holds for block verification too,
which looks at drafts behind a rejection: their text is drawn anew in the next round, from fresh uniforms, so that what
the heat has learnt of the rejected ones says nothing about it. A heat that reads the drafts of its own round would be
another matter: its q is not the one that they were sampled from.

Left out: a heat per position or per entropy (worth at most 0.8 points of acceptance on synthetic rows), trees.
Axes: B rows, k slots, n judged slots, G grid, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from forerun.drafters.base import Rows
from forerun.errors import UserError
from forerun.types import Draft, VerifyResult

GRID = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
ELEMENTS = 1 << 21  # exponentials per round: a few milliseconds of one core, whatever the vocabulary

HeatSetting = float | Literal["auto"]


class FixedHeat:
    """The same heat in every round; learns nothing and costs nothing."""

    def __init__(self, value: float) -> None:
        self.value = value

    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """See `Learning.learn`."""

    def metrics(self) -> dict[str, float]:
        return {}


class OnlineHeat:
    """The heat of the grid with the largest mean overlap so far; it outlives the streams of an engine."""

    def __init__(self, grid: Sequence[float] = GRID, start: float = 1.0, slots: int = 16, memory: float = 64.0) -> None:
        """`start` drafts the first round; at most `slots` are looked at per round, and `memory` rounds remembered."""
        self.grid, self.value = tuple(grid), start
        self._slots, self._decay = slots, 1.0 - 1.0 / memory
        self._sums = torch.zeros(len(self.grid), dtype=torch.float64)
        self._weight = 0.0
        self._rounds = self._seen = 0

    @property
    def means(self) -> list[float]:
        """Exponentially averaged overlap per heat of the grid; zeros before the first judged slot."""
        return (self._sums / max(self._weight, 1e-12)).tolist()

    @torch.no_grad()
    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """Take in a judged round; see `Learning.learn`. Deterministic drafts, trees and greedy rows teach nothing."""
        if draft.log_q is None or draft.parents is not None:
            return
        limit = max(1, min(self._slots, ELEMENTS // (len(self.grid) * max(draft.log_q.shape[2], 1))))
        row, slot = self._some(*reached(rows, draft, verdict), limit)
        if not len(row):
            return
        log_p = torch.log_softmax(logits[row, slot].float() / rows.temperature[row, None], dim=-1)
        if draft.vocabulary is not None:
            log_p = log_p[:, draft.vocabulary]
        found = overlaps(log_p, draft.log_q[row, slot].float(), self.value, self.grid)
        self._sums = self._sums * self._decay + found.sum(1).double().cpu()
        self._weight = self._weight * self._decay + len(row)
        self._seen += len(row)
        self.value = self.grid[int(self._sums.argmax())]

    def metrics(self) -> dict[str, float]:
        """The heat in force, and how many slots have taught it."""
        return {"draft_temperature": self.value, "draft_temperature_slots": self._seen}

    def _some(self, row: Tensor, slot: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """At most `limit` of the reached slots, spread over the rows, others in every round."""
        self._rounds += 1
        if len(row) <= limit:
            return row, slot
        spread = torch.arange(limit, device=row.device) * len(row) // limit
        chosen = (spread + self._rounds) % len(row)
        return row[chosen], slot[chosen]


Heat = FixedHeat | OnlineHeat


def make_heat(setting: HeatSetting, proposal: str) -> Heat:
    """The heat of a recipe's `draft_temperature`.

    Raises:
        UserError: it shall be learnt, and nothing is sampled.
    """
    if setting != "auto":
        return FixedHeat(setting)
    if proposal != "sampled":
        raise UserError(
            f"speculation.draft_temperature=auto learns the temperature of sampled drafts, but "
            f"speculation.proposal={proposal} samples none; set proposal=sampled or a number"
        )
    return OnlineHeat()


def reached(rows: Rows, draft: Draft, verdict: VerifyResult) -> tuple[Tensor, Tensor]:
    """Rows [n] and slots [n] of a chain draft that were drafted warm and whose earlier drafts were all accepted."""
    slots = torch.arange(draft.tokens.shape[1], device=draft.tokens.device)
    mask = (slots < draft.lengths[:, None]) & (slots <= verdict.accepted[:, None]) & (rows.temperature > 0)[:, None]
    row, slot = mask.nonzero(as_tuple=True)
    return row, slot


def overlaps(log_p: Tensor, log_q: Tensor, heat: float, grid: Sequence[float]) -> Tensor:  # [G, n]
    """sum_v min(p_v, q_v) at every heat of `grid`.

    Args:
        log_p: [n, D] log-probabilities of the policy, over the draft vocabulary (they need not sum to one there).
        log_q: [n, D] log-probabilities of the drafter at `heat`; at another heat h, q is the softmax of
            log_q · heat / h.
    """
    p = log_p.exp()
    return torch.stack([torch.minimum(p, (log_q * (heat / other)).softmax(-1)).sum(-1) for other in grid])
