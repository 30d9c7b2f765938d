"""A drafter that lives inside the engine: vLLM's own (suffix decoding, DFlash, DSpark), as `speculation.vllm` says.

Nothing of it is here, so nothing here drafts or trains: it stands for it in a run, without weights, and says so where
another engine asks it for a draft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from forerun.drafters.base import Rows, no_weights
from forerun.errors import UserError
from forerun.types import Draft, VerifyResult


class ForeignDrafter:
    """What `speculation.method: vllm` names."""

    method = "vllm"
    aux_layers: tuple[int, ...] = ()

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings`: of `speculation.vllm`."""
        self.settings = dict(settings)

    def open(self, rows: int, positions: int, k: int) -> None:
        """Raises UserError: it drafts in vLLM alone."""
        self._elsewhere()

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        self._elsewhere()

    def copy(self, source: int, target: int) -> None:
        self._elsewhere()

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        self._elsewhere()

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        self._elsewhere()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError unless `state` is empty."""
        no_weights(state, self.method)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write its settings to config.json; what it has read stays in vLLM."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {"method": self.method, "vllm": self.settings, "forerun": about}
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")

    def _elsewhere(self) -> NoReturn:
        raise UserError(
            f"speculation.method=vllm is a drafter of vLLM's own ({self.settings.get('method')}), and the local engine "
            "has none of them; set rollout.engine=vllm"
        )
