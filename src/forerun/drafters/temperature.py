"""The draft temperature, relative to that of the rollouts: fixed, or tuned online (`draft_temperature: auto`).

A drafted token is accepted with probability sum_v min(p_v, q_v) (2211.17192, corollary 3.6). Where the policy has
verified a draft this is known for every temperature of q: it is computed on a grid at a few of a round's reached draft
positions (those whose earlier drafts were accepted) and averaged exponentially; the best one drafts the next round.

Losslessness. The temperature of a round is a function of earlier rounds alone, and a round draws from fresh uniforms
(`round_keys`: a new root, new keys) and from the q that it hands over. So its tokens, continued by the policy, have the
policy's distribution at *whatever* temperature; by induction over rounds so has the text. Block verification reads
drafts after a rejection, but their text is drawn anew in the next round. A temperature that read the drafts of its own
round would not be safe: its q is not the one that they were sampled from.
Axes: B rows, k draft positions, n verified positions, G grid, V vocabulary, D draft vocabulary.
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

Temperature = float | Literal["auto"]


class FixedTemperature:
    """The same draft temperature in every round."""

    def __init__(self, value: float) -> None:
        self.value = value

    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """See `Drafter.learn`: nothing."""

    def metrics(self) -> dict[str, float]:
        return {}


class OnlineTemperature:
    """The temperature of the grid with the largest mean overlap so far; it outlives the streams of an engine."""

    def __init__(
        self, grid: Sequence[float] = GRID, start: float = 1.0, positions: int = 16, memory: float = 64.0
    ) -> None:
        """`start` drafts the first round; at most `positions` are read per round, `memory` rounds remembered."""
        self.grid, self.value = tuple(grid), start
        self._positions, self._decay = positions, 1.0 - 1.0 / memory
        self._sums = torch.zeros(len(self.grid), dtype=torch.float64)
        self._weight = 0.0
        self._rounds = self._seen = 0

    @property
    def means(self) -> list[float]:
        """Exponentially averaged overlap per temperature of the grid; zeros before the first verified position."""
        return (self._sums / max(self._weight, 1e-12)).tolist()

    @torch.no_grad()
    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """Use a verified round; see `Drafter.learn`. Deterministic drafts, trees and greedy rows are skipped."""
        if draft.log_q is None or draft.parents is not None:
            return
        limit = max(1, min(self._positions, ELEMENTS // (len(self.grid) * max(draft.log_q.shape[2], 1))))
        row, position = self._some(*reached(rows, draft, verdict), limit)
        if not len(row):
            return
        log_p = torch.log_softmax(logits[row, position].float() / rows.temperature[row, None], dim=-1)
        if draft.vocabulary is not None:
            log_p = log_p[:, draft.vocabulary]
        found = overlaps(log_p, draft.log_q[row, position].float(), self.value, self.grid)
        self._sums = self._sums * self._decay + found.sum(1).double().cpu()
        self._weight = self._weight * self._decay + len(row)
        self._seen += len(row)
        self.value = self.grid[int(self._sums.argmax())]

    def metrics(self) -> dict[str, float]:
        return {"draft_temperature": self.value, "draft_temperature_slots": self._seen}

    def _some(self, row: Tensor, position: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """At most `limit` of the reached positions, spread over the rows, others in every round."""
        self._rounds += 1
        if len(row) <= limit:
            return row, position
        spread = torch.arange(limit, device=row.device) * len(row) // limit
        chosen = (spread + self._rounds) % len(row)
        return row[chosen], position[chosen]


DraftTemperature = FixedTemperature | OnlineTemperature


def draft_temperature_of(setting: Temperature, proposal: str) -> DraftTemperature:
    """The draft temperature that a recipe asks for. Raises UserError when it is "auto", and nothing is sampled."""
    if setting != "auto":
        return FixedTemperature(setting)
    if proposal != "sampled":
        raise UserError(
            f"speculation.draft_temperature=auto learns the temperature of sampled drafts, but "
            f"speculation.proposal={proposal} samples none; set proposal=sampled or a number"
        )
    return OnlineTemperature()


def tempered_head(head: Tensor, temperature: float) -> Tensor:
    """An output head [D, H] whose logits, sampled at T, are those of `head` sampled at T · temperature."""
    return head if temperature == 1.0 else (head.float() / temperature).to(head.dtype)


def reached(rows: Rows, draft: Draft, verdict: VerifyResult) -> tuple[Tensor, Tensor]:
    """Rows [n] and positions [n] of a chain that were drafted at a temperature above 0, all drafts before accepted."""
    positions = torch.arange(draft.tokens.shape[1], device=draft.tokens.device)
    mask = (positions < draft.lengths[:, None]) & (positions <= verdict.accepted[:, None])
    row, position = (mask & (rows.temperature > 0)[:, None]).nonzero(as_tuple=True)
    return row, position


def overlaps(log_p: Tensor, log_q: Tensor, temperature: float, grid: Sequence[float]) -> Tensor:  # [G, n]
    """sum_v min(p_v, q_v) at every draft temperature of `grid`.

    Args:
        log_p: [n, D] log-probabilities of the policy, over the draft vocabulary (they need not sum to one there).
        log_q: [n, D] log-probabilities of the drafter at `temperature`; at another one t, q is the softmax of
            log_q · temperature / t.
    """
    p = log_p.exp()
    return torch.stack([torch.minimum(p, (log_q * (temperature / other)).softmax(-1)).sum(-1) for other in grid])
