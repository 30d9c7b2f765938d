"""Prompt lookup: the tokens that followed an earlier occurrence of the newest n-gram, in the sample's own text.

The definition is vLLM's (`NgramProposer`, CPU and GPU): of the lengths n from prompt_lookup_max down to
prompt_lookup_min take the first whose suffix n-gram also ends at an earlier token of prompt + completion, take the
*earliest* such place (it may overlap the suffix), and propose the at most k tokens after it, fewer where the text ends.
The draft is one-hot.
vLLM scans the whole text every round; here every row keeps a table from n-gram to its first end, so that a round
costs as much as the tokens it added. No forward is run; at temperature 1 long drafts cost more rows than they save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from forerun.config import NgramConfig, SpeculationConfig
from forerun.drafters.base import Drafter, Rows, deterministic_draft, emitted
from forerun.drafters.temperature import refuse_draft_temperature
from forerun.models import Policy
from forerun.types import Draft, VerifyResult

Ends = dict[tuple[int, ...], int]  # n-gram -> index after its first occurrence


@dataclass(slots=True)
class LookupText:
    """A growing text and a table of where each of its n-grams first ended."""

    shortest: int
    longest: int
    tokens: list[int] = field(default_factory=list)
    ends: Ends = field(default_factory=dict)
    prompt_ends: Ends = field(default_factory=dict)  # of the prompt: shared by its samples, never written by them

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens, and the n-grams that end in them to the table."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for n in range(self.shortest, min(self.longest, end) + 1):
                gram = tuple(self.tokens[end - n :])
                if gram not in self.prompt_ends:
                    self.ends.setdefault(gram, end)

    def branch(self) -> LookupText:
        """A sample of this prompt: the same tokens, tables of its own from here on."""
        return LookupText(self.shortest, self.longest, list(self.tokens), {}, self.ends)

    def continuation(self, k: int) -> list[int]:
        """At most k tokens after the earliest occurrence of the longest suffix n-gram that occurred before."""
        end = len(self.tokens)
        for n in range(min(self.longest, end), self.shortest - 1, -1):
            gram = tuple(self.tokens[end - n :])
            first = self.prompt_ends.get(gram) or self.ends[gram]
            if first < end:
                return self.tokens[first : first + k]
        return []


class NgramDrafter(Drafter):
    """`LookupText` per cache row. It has no weights and forgets everything with the rows."""

    name = "ngram"
    Config = NgramConfig
    vllm_refusal = ""

    def __init__(self, settings: NgramConfig) -> None:
        self.settings = settings
        self._rows: dict[int, LookupText] = {}
        self._prompts: set[int] = set()  # rows that hold a prompt, not a sample

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> NgramDrafter:
        refuse_draft_temperature(speculation)
        return cls(speculation.ngram)

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        """vLLM's own prompt lookup."""
        return {"method": "ngram", **speculation.ngram.model_dump()}

    def open(self, rows: int, positions: int, k: int) -> None:
        self._rows = {}
        self._prompts = set()

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        for row, (prompt, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True), first_row):
            text = LookupText(self.settings.prompt_lookup_min, self.settings.prompt_lookup_max)
            text.extend(prompt[:length])
            self._rows[row] = text
            self._prompts.add(row)

    def copy(self, source: int, target: int) -> None:
        """A prompt's row begins a sample in `target`; a sample's row moves there."""
        text = self._rows[source]
        self._rows[target] = text.branch() if source in self._prompts else text

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Look up every row's newest n-gram; a row without an earlier occurrence drafts nothing."""
        proposals = [self._rows[row].continuation(most) for row, most in enumerate(budget.tolist())]
        return deterministic_draft(proposals, rows.last.device)

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        for row, tokens in enumerate(emitted(verdict)):
            self._rows[row].extend(tokens)

    def description(self) -> dict[str, Any]:
        """Its settings."""
        return self.settings.model_dump()
