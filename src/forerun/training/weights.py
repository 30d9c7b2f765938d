"""Weight versions: policy and drafter under one number, with a checksum per group that every engine must hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from forerun.drafters import Drafter
from forerun.engine import Weights
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.workers.shared_memory import Segment


def pack_weights(
    version: int, policy: Policy, drafter: Drafter | None, shared: bool = True, frozen: bool = False
) -> Weights:
    """The current weights under `version`: checksums, with the tensors for an engine that keeps copies.

    Args:
        shared: the engine runs these very modules and needs no tensors.
        frozen: copy the tensors, for an engine that reads them during the next update; into shared memory where there
            is room.
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
        except OSError:  # the engine warns when it has to stream them
            groups = {group: {name: t.clone() for name, t in state.items()} for group, state in groups.items()}
    return Weights(version, sums, groups["policy"], groups.get("draft"), segment)
