"""One version of everything, with a checksum per group: what the learner publishes and every engine must hold."""

from __future__ import annotations

from forerun.draft import Drafter
from forerun.engine import Weights
from forerun.models import Policy
from forerun.models.checksum import checksum


def publish(version: int, policy: Policy, drafter: Drafter | None) -> Weights:
    """The current weights under `version`, for an engine that shares the live modules: checksums, no copies."""
    sums = {"policy": checksum(policy.model.state_dict())}
    if drafter is not None:
        sums["draft"] = checksum(drafter.state_dict())
    return Weights(version, sums)
