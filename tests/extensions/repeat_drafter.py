"""A drafter: proposes the newest token again. It has no weights and no memory."""

import torch
from torch import Tensor

from forerun.config import SpeculationConfig
from forerun.config.drafters import DrafterConfig
from forerun.drafters import Drafter, Rows
from forerun.drafters.base import deterministic_draft
from forerun.models import Policy
from forerun.types import Draft, VerifyResult


class RepeatConfig(DrafterConfig):
    """Its settings: `speculation.settings` of a recipe."""

    times: int = 1


class RepeatDrafter(Drafter):
    """The newest token, `times` times."""

    name = "repeat"
    Config = RepeatConfig

    def __init__(self, settings: RepeatConfig) -> None:
        self.settings = settings

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> "RepeatDrafter":
        return cls(cls.own_settings(speculation))

    def open(self, rows: int, positions: int, k: int) -> None: ...

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None: ...

    def copy(self, source: int, target: int) -> None: ...

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        times = torch.minimum(budget, torch.full_like(budget, self.settings.times))
        proposals = [[token] * count for token, count in zip(rows.last.tolist(), times.tolist(), strict=True)]
        return deterministic_draft(proposals, rows.last.device)

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None: ...
