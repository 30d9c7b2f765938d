"""Rollout engines: prompts in, samples of the policy out."""

from __future__ import annotations

from typing import Any

from forerun.engine.base import Counters, RolloutEngine, Sampling, Weights
from forerun.errors import UserError

__all__ = ["Counters", "RolloutEngine", "Sampling", "Weights", "load"]


def load(engine: str, *, policy: str, dtype: str, speculation: dict[str, Any] | None, slots: int) -> RolloutEngine:
    """See `forerun.load_engine`."""
    from pydantic import ValidationError

    from forerun.config import SpeculationConfig
    from forerun.draft import load_drafter
    from forerun.engine.local.engine import LocalEngine
    from forerun.models import load_policy

    if engine != "local":
        raise UserError(f"There is no engine '{engine}'; this version has 'local'")
    try:
        settings = SpeculationConfig.model_validate(speculation or {"method": "none"})
    except ValidationError as error:
        raise UserError(f"speculation: {error.errors()[0]['msg']} ({error.errors()[0]['loc']})") from None
    loaded = load_policy(policy, dtype)
    drafter = load_drafter(loaded, settings)
    return LocalEngine(loaded, drafter, k=settings.tokens, rule=settings.verify, slots=slots)
