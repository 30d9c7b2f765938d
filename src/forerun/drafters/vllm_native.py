"""A drafter of vLLM's own (suffix decoding, DFlash, DSpark), configured by `speculation.vllm`, without weights here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from forerun.config import SpeculationConfig
from forerun.drafters.base import Drafter
from forerun.errors import UserError
from forerun.models import Policy


class VllmNativeDrafter(Drafter):
    """Represents vLLM's drafter in a run, and refuses to draft in another engine."""

    name = "vllm"
    vllm_refusal = ""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> VllmNativeDrafter:
        return cls(speculation.vllm)

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        """Nothing to add: `speculation.vllm` is handed on for every drafter."""
        return {}

    def description(self) -> dict[str, Any]:
        return {"vllm": self.settings}

    def open(self, rows: int, positions: int, k: int) -> NoReturn:
        raise UserError(
            f"speculation.method=vllm is a drafter of vLLM's own ({self.settings.get('method')}), and the local engine "
            "has none of them; set rollout.engine=vllm"
        )
