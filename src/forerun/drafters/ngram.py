"""Prompt lookup: the tokens that followed an earlier occurrence of the newest n-gram, in the sample's own text.

The definition is vLLM's (`NgramProposer`, CPU and GPU): of the lengths n from prompt_lookup_max down to
prompt_lookup_min take the first whose suffix n-gram also ends at an earlier token of prompt + completion, take the
*earliest* such place (it may overlap the suffix), and propose the at most k tokens after it, fewer where the text ends.
The draft is one-hot.
vLLM scans the whole text every round; here every row keeps a table from n-gram to its first end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.config import NgramConfig, SpeculationConfig
from forerun.drafters.lookup import LookupDrafter, refuse_draft_temperature
from forerun.models import Policy

Ends = dict[tuple[int, ...], int]  # n-gram -> index after its first occurrence


@dataclass(slots=True)
class LookupText:
    """A growing text and a table of where each of its n-grams first ended."""

    shortest: int
    longest: int
    tokens: list[int] = field(default_factory=list)
    ends: Ends = field(default_factory=dict)
    prompt_ends: Ends = field(default_factory=dict)  # of the prompt: shared by its samples, never written by them
    is_prompt: bool = True

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens, and the n-grams that end in them to the table."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for n in range(self.shortest, min(self.longest, end) + 1):
                gram = tuple(self.tokens[end - n :])
                if gram not in self.prompt_ends:
                    self.ends.setdefault(gram, end)

    def sample(self) -> LookupText:
        """Of a prompt, a sample: the same tokens, tables of its own from here on."""
        if not self.is_prompt:
            return self
        return LookupText(self.shortest, self.longest, list(self.tokens), {}, self.ends, is_prompt=False)

    def continuation(self, k: int) -> list[int]:
        """At most k tokens after the earliest occurrence of the longest suffix n-gram that occurred before."""
        end = len(self.tokens)
        for n in range(min(self.longest, end), self.shortest - 1, -1):
            gram = tuple(self.tokens[end - n :])
            first = self.prompt_ends.get(gram) or self.ends[gram]
            if first < end:
                return self.tokens[first : first + k]
        return []


class NgramDrafter(LookupDrafter):
    """A `LookupText` per cache row."""

    name = "ngram"
    Config = NgramConfig

    def __init__(self, settings: NgramConfig) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> NgramDrafter:
        refuse_draft_temperature(speculation)
        return cls(speculation.ngram)

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        return {"method": "ngram", **speculation.ngram.model_dump()}

    def prompt(self, tokens: list[int]) -> LookupText:
        text = LookupText(self.settings.prompt_lookup_min, self.settings.prompt_lookup_max)
        text.extend(tokens)
        return text

    def description(self) -> dict[str, Any]:
        return self.settings.model_dump()
