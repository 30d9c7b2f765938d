"""One version of everything, with a checksum per group: what the learner publishes and every engine must hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from forerun.draft import Drafter
from forerun.engine import Weights
from forerun.engine.segment import Segment
from forerun.models import Policy
from forerun.models.checksum import checksum


def publish(
    version: int, policy: Policy, drafter: Drafter | None, shared: bool = True, frozen: bool = False
) -> Weights:
    """The current weights under `version`: checksums, with the tensors for an engine that keeps copies.

    Args:
        frozen: copy the tensors, for a reader that looks at them while the next version is being learnt; into memory
            that replicas of this machine can map, where there is room.
    """
    groups: dict[str, Mapping[str, Tensor]] = {"policy": policy.model.state_dict()}
    groups |= {} if drafter is None else {"draft": drafter.state_dict()}
    sums = {group: checksum(state) for group, state in groups.items()}
    if shared:
        return Weights(version, sums)
    segment = None
    if frozen:
        try:
            segment = Segment.of(groups)
            groups = dict(segment.tensors)
        except OSError:  # an engine that would have mapped it says so
            groups = {group: {name: t.clone() for name, t in state.items()} for group, state in groups.items()}
    return Weights(version, sums, groups["policy"], groups.get("draft"), segment)
