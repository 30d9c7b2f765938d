"""Rollout engines: prompts in, samples of the policy out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forerun.engine.base import Counters, RolloutEngine, Sampling, Weights
from forerun.errors import UserError

if TYPE_CHECKING:
    from forerun.config import RolloutConfig, SpeculationConfig
    from forerun.drafters import Drafter
    from forerun.engine.worker import Starter
    from forerun.models import Policy

ENGINES = ("local", "vllm")
__all__ = ["Counters", "RolloutEngine", "Sampling", "Weights", "around", "load", "rule_in_force", "shares_weights"]


def load(engine: str, *, policy: str, dtype: str, speculation: dict[str, Any] | None, slots: int) -> RolloutEngine:
    """See `forerun.load_engine`."""
    from pydantic import ValidationError

    from forerun.config import RolloutConfig, SpeculationConfig
    from forerun.drafters import load_drafter
    from forerun.models import load_policy

    if engine not in ENGINES:
        raise UserError(f"There is no engine '{engine}'; this version has {' and '.join(ENGINES)}")
    try:
        settings = SpeculationConfig.model_validate(speculation or {"method": "none"})
    except ValidationError as error:
        raise UserError(f"speculation: {error.errors()[0]['msg']} ({error.errors()[0]['loc']})") from None
    if engine == "vllm":
        from forerun.engine.vllm.adapter import Limits, VllmEngine

        return VllmEngine(policy, settings, dtype=dtype, limits=Limits(slots=slots))
    loaded = load_policy(policy, dtype)
    return around(RolloutConfig(slots=slots), loaded, load_drafter(loaded, settings), settings)


def around(
    rollout: RolloutConfig,
    policy: Policy,
    drafter: Drafter | None,
    speculation: SpeculationConfig,
    starter: Starter | None = None,
) -> RolloutEngine:
    """The recipe's `RolloutEngine` for a live policy and drafter; plain without a drafter.

    Args:
        starter: where replicas' processes come from; None: this machine.
    """
    if rollout.replicas:
        from forerun.engine.replicated import Patience, ReplicatedEngine

        return ReplicatedEngine(
            rollout.engine, policy, drafter, speculation, slots=rollout.slots, replicas=rollout.replicas,
            patience=Patience(silence_s=rollout.silence_s), starter=starter,
        )  # fmt: skip
    if rollout.engine == "vllm":
        from forerun.engine.vllm.adapter import Limits, VllmEngine

        block = speculation if drafter is not None else None
        return VllmEngine.around(policy, drafter, block, limits=Limits(slots=rollout.slots))
    from forerun.engine.local.engine import LocalEngine

    k = speculation.tokens if drafter is not None else 0
    return LocalEngine(policy, drafter, k=k, rule=speculation.verify, slots=rollout.slots)


def shares_weights(rollout: RolloutConfig) -> bool:
    """Whether the recipe's engine runs the live modules, so that a version needs no tensors."""
    return rollout.engine == "local" and not rollout.replicas


def rule_in_force(engine: RolloutEngine, speculation: SpeculationConfig) -> str:
    """What verifies drafts in this engine: "token", "block", "walk" (trees), or "plain" where nothing is drafted."""
    if not speculation.tokens:
        return "plain"
    rule: str = engine.metrics().get("rule", "walk" if speculation.method == "graft" else speculation.verify)
    return rule
