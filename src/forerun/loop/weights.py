"""One version of everything, with a checksum per group: what the learner publishes and every engine must hold."""

from __future__ import annotations

from forerun.draft import Drafter
from forerun.engine import Weights
from forerun.models import Policy
from forerun.models.checksum import checksum


def publish(version: int, policy: Policy, drafter: Drafter | None, shared: bool = True) -> Weights:
    """The current weights under `version`: checksums, with the tensors for an engine that keeps copies."""
    state = policy.model.state_dict()
    draft = drafter.state_dict() if drafter is not None else None
    sums = {"policy": checksum(state)} | ({} if draft is None else {"draft": checksum(draft)})
    return Weights(version, sums) if shared else Weights(version, sums, state, draft)
