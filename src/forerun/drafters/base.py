"""The drafter's contract. A new drafter is one file with a class that has these methods, and one line in `DRAFTERS`.

Non-anticipation: whether slot j of a draft is proposed may depend only on what is known before its token is sampled.
The `log_q` that a draft carries is the very tensor that its tokens were sampled from.
Left out: acceptance (`acceptance/`) and how many tokens to draft (`budget/`, the engine).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from forerun.acceptance.random import Purpose, inverse_cdf_log, round_keys, uniforms
from forerun.errors import UserError
from forerun.types import Draft, VerifyResult


@dataclass(frozen=True, slots=True)
class Rows:
    """The live sequences of a round, in cache rows 0 .. B-1.

    Row b has `lengths[b]` tokens in the policy's cache; `last[b]` is its newest token, which is not among them yet and
    will sit at position lengths[b].
    """

    last: Tensor  # [B] int64
    lengths: Tensor  # [B] int64
    seeds: Tensor  # [B] int64, one per request
    temperature: Tensor  # [B] float32, 0 is greedy

    @property
    def count(self) -> int:
        return self.last.shape[0]


class Drafter(Protocol):
    """What the engine asks of a drafter."""

    method: str  # its name in a recipe
    aux_layers: tuple[int, ...]  # policy layers whose inputs it wants to see; empty: none

    def open(self, rows: int, positions: int, k: int) -> None:
        """Make room for `rows` sequences of at most `positions` tokens, drafts of at most `k`; forget the old ones."""

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        """Prompts tokens [P, L] of `lengths` [P] entered rows first_row, first_row + 1, ...

        features [P, L-1, T·H] are the policy's at the taps, for all but each prompt's last token.
        """

    def copy(self, source: int, target: int) -> None:
        """Row `target` continues what row `source` holds."""

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Draft at most budget [B] tokens per row; a tree: paths of at most that many, and at most `k` nodes in all."""

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        """Row b emitted verdict.tokens[b, : accepted[b] + 1], and its sample holds them all: none beyond its end.

        features [B, n, T·H] are the policy's at the taps, for the n tokens that it just ran (newest token and drafts);
        of a tree, for the newest token and the accepted path.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights, empty when it has none.

        Only what a weight version stands for and what a learner hands over. What a drafter has read (a corpus) is no
        weight: it stays with the engine, and travels in the folder that `save` writes.
        """

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace its weights. Raises UserError when a tensor is missing, unknown or of another shape."""

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write it, memory included, to a folder from which it can be loaded; `about` records how it was made."""


@runtime_checkable
class Counting(Protocol):
    """A drafter that counts something of its own, such as what it threw away to stay within its memory."""

    def metrics(self) -> Mapping[str, float]:
        """Names and counts, since the drafter was made, and settings that it finds by itself as they are now."""


@runtime_checkable
class Learning(Protocol):
    """A drafter that learns from the policy's rows at the tokens it verified, accepted or not."""

    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """A round was judged. What is learnt from it may change how later rounds are drafted.

        Called once per round, plain ones too, after the verdict and before `observe`.

        Args:
            logits: [B, k+1, V] of the policy as they were judged by, not divided by the temperature: row 0 after the
                newest token, row j + 1 after slot j. Not to be kept or copied whole: nothing in a round is larger.
            verdict: as verification gave it, also where a sample ends inside its accepted run.
        """


def heat_of_round(proposal: str, rows: Rows, heat: float) -> float | None:
    """The heat to draft with; None: one-hot drafts of the likeliest tokens, so asked, or as none samples."""
    return None if proposal == "argmax" or bool((rows.temperature == 0).all()) else heat


def sample_draft(logits: Tensor, rows: Rows, slot: int, heat: float | None) -> tuple[Tensor, Tensor]:
    """Draw slot number `slot` of every row from the drafter's logits [B, D]; greedy rows take their argmax.

    Args:
        heat: temperature of the drafts over that of the rollouts, None: every row takes its argmax.

    Returns:
        Tokens [B] as indices into D, and the log-probabilities [B, D] that they were drawn from (the logits without
        heat, where q is one-hot).
    """
    if heat is None:
        return logits.argmax(-1), logits
    warm = rows.temperature > 0
    temperature = torch.where(warm, rows.temperature, 1.0) * heat
    log_q = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
    keys = round_keys(rows.lengths, slot + 1)[:, slot:]
    drawn = inverse_cdf_log(log_q, uniforms(rows.seeds, keys, Purpose.DRAFT)[:, 0])
    return torch.where(warm, drawn, logits.argmax(-1)), log_q


def deterministic_draft(proposals: Sequence[Sequence[int]], device: torch.device) -> Draft:
    """A chain draft of fixed tokens (q is one-hot, log_q None), padded to the longest proposal."""
    lengths = [len(p) for p in proposals]
    k = max(lengths, default=0)
    padded = [[*p, *([0] * (k - len(p)))] for p in proposals]
    tokens = torch.tensor(padded, dtype=torch.int64, device=device).view(len(proposals), k)
    return Draft(tokens, torch.tensor(lengths, dtype=torch.int64, device=device))


def emitted(verdict: VerifyResult) -> list[list[int]]:
    """The tokens that each row emitted, as plain lists."""
    accepted, tokens = verdict.accepted.tolist(), verdict.tokens.tolist()
    return [row[: a + 1] for a, row in zip(accepted, tokens, strict=True)]


def no_weights(state: Mapping[str, Tensor], method: str) -> None:
    """`load_state_dict` of a drafter without weights: an empty state fits, any tensor is a mistake.

    Raises:
        UserError: the state names tensors.
    """
    if state:
        raise UserError(f"The drafter '{method}' has no weights, but the state holds {sorted(state)}")
