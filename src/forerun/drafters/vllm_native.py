"""A drafter of vLLM's own (suffix decoding, DFlash, DSpark), configured by `speculation.vllm`.

It runs inside vLLM. The class here represents it in a run, without weights, and refuses to draft in another engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from forerun.config import SpeculationConfig
from forerun.drafters.base import Drafter, Rows
from forerun.errors import UserError
from forerun.models import Policy
from forerun.types import Draft, VerifyResult


class VllmNativeDrafter(Drafter):
    """What `speculation.method: vllm` names."""

    name = "vllm"
    vllm_refusal = ""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings`: of `speculation.vllm`."""
        self.settings = dict(settings)

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> VllmNativeDrafter:
        """See `Drafter.from_config`."""
        return cls(speculation.vllm)

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        """Nothing to add: `speculation.vllm` is handed on for every drafter."""
        return {}

    def open(self, rows: int, positions: int, k: int) -> None:
        """Raises UserError: it drafts in vLLM alone."""
        self._refuse()

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        self._refuse()

    def copy(self, source: int, target: int) -> None:
        self._refuse()

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        self._refuse()

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        self._refuse()

    def description(self) -> dict[str, Any]:
        """Its settings; its corpus stays in vLLM."""
        return {"vllm": self.settings}

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"speculation.method=vllm is a drafter of vLLM's own ({self.settings.get('method')}), and the local engine "
            "has none of them; set rollout.engine=vllm"
        )
