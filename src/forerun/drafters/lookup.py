"""What drafters share that look their drafts up: one text per cache row, no weights, one-hot drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from forerun.config import SpeculationConfig
from forerun.drafters.base import Drafter, Rows, deterministic_draft, emitted
from forerun.errors import UserError
from forerun.types import Draft, VerifyResult


class RowText(Protocol):
    """The text of a cache row: a prompt, or a sample of one."""

    def sample(self) -> RowText:
        """Of a prompt, a new sample of it; a sample itself."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of a sample."""

    def continuation(self, k: int) -> list[int]:
        """At most k tokens that may follow."""


class LookupDrafter(Drafter):
    """Base class: a subclass makes the texts of prompts."""

    vllm_refusal = ""

    def __init__(self) -> None:
        self._rows: dict[int, RowText] = {}

    def prompt(self, tokens: list[int]) -> RowText:
        """The text of a prompt that entered a row."""
        raise NotImplementedError(f"{type(self).__name__}.prompt")

    def open(self, rows: int, positions: int, k: int) -> None:
        self._rows = {}

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        for row, (ids, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True), first_row):
            self._rows[row] = self.prompt(ids[:length])

    def copy(self, source: int, target: int) -> None:
        """A prompt's row begins a sample in `target`; a sample's row moves there."""
        self._rows[target] = self._rows[source].sample()

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Continue every row's text; one that matches nothing drafts nothing."""
        proposals = [self._rows[row].continuation(most) for row, most in enumerate(budget.tolist())]
        return deterministic_draft(proposals, rows.last.device)

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        for row, tokens in enumerate(emitted(verdict)):
            self._rows[row].extend(tokens)


def refuse_draft_temperature(speculation: SpeculationConfig) -> None:
    """Raises UserError when the recipe sets a draft temperature."""
    if speculation.draft_temperature != 1.0:
        raise UserError(
            f"speculation.draft_temperature={speculation.draft_temperature} asks for sampled drafts, but "
            f"method={speculation.method} looks its drafts up; leave it at 1"
        )
