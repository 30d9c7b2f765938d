"""One version of everything, with a checksum per group: what the learner publishes and every engine must hold."""

from __future__ import annotations

from forerun.draft import Drafter
from forerun.engine import Weights
from forerun.models import Policy
from forerun.models.checksum import checksum


def publish(
    version: int, policy: Policy, drafter: Drafter | None, shared: bool = True, frozen: bool = False
) -> Weights:
    """The current weights under `version`: checksums, with the tensors for an engine that keeps copies.

    Args:
        frozen: copy the tensors, for a reader that looks at them while the next version is being learnt.
    """
    state = policy.model.state_dict()
    draft = drafter.state_dict() if drafter is not None else None
    if frozen:
        state = {name: tensor.clone() for name, tensor in state.items()}
        draft = None if draft is None else {name: tensor.clone() for name, tensor in draft.items()}
    sums = {"policy": checksum(state)} | ({} if draft is None else {"draft": checksum(draft)})
    return Weights(version, sums) if shared else Weights(version, sums, state, draft)
