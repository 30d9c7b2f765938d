"""Rollout engines: prompts in, samples of the policy out. `ENGINES` names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forerun.engine.base import Counters, RolloutEngine, Sampling, Weights
from forerun.errors import UserError
from forerun.registry import ENGINES

if TYPE_CHECKING:
    from forerun.config import RolloutConfig, SpeculationConfig
    from forerun.drafters import Drafter
    from forerun.models import Policy
    from forerun.workers.handle import Launcher

__all__ = ["ENGINES", "Counters", "RolloutEngine", "Sampling", "Weights", "build_engine", "load"]


def load(engine: str, *, policy: str, dtype: str, speculation: dict[str, Any] | None, slots: int) -> RolloutEngine:
    """See `forerun.load_engine`."""
    from pydantic import ValidationError

    from forerun.config import SpeculationConfig

    kind: type[RolloutEngine] = ENGINES.load(engine)
    try:
        settings = SpeculationConfig.model_validate(speculation or {"method": "none"})
    except ValidationError as error:
        raise UserError(f"speculation: {error.errors()[0]['msg']} ({error.errors()[0]['loc']})") from None
    return kind.from_folder(policy, dtype, settings, slots)


def build_engine(
    rollout: RolloutConfig,
    policy: Policy,
    drafter: Drafter | None,
    speculation: SpeculationConfig,
    launcher: Launcher | None = None,
    ranks: int = 1,
) -> RolloutEngine:
    """The recipe's engine for a live policy and drafter; plain without a drafter.

    Args:
        launcher: starts the processes of replicas; None: on this machine.
        ranks: of the learner, whose GPUs replicas avoid.
    """
    if rollout.replicas:
        from forerun.engine.replicated import ReplicatedEngine
        from forerun.workers.handle import Timeouts

        return ReplicatedEngine(
            rollout.engine, policy, drafter, speculation, slots=rollout.slots, replicas=rollout.replicas,
            timeouts=Timeouts(heartbeat_s=rollout.silence_s), launcher=launcher, ranks=ranks,
        )  # fmt: skip
    kind: type[RolloutEngine] = ENGINES.load(rollout.engine)
    return kind.from_live(policy, drafter, speculation, rollout.slots)
