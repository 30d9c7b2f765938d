"""One version of everything: what the learner publishes, with a checksum per group that every engine must hold, and
what a run leaves behind in other programs' formats.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from forerun.config import Recipe
from forerun.drafters import Drafter
from forerun.engine import Weights
from forerun.learner.lora import LoraAdapter
from forerun.models import Policy, save_policy
from forerun.models.checksum import checksum
from forerun.tracking.files import disk_errors
from forerun.tracking.run_folder import RunFolder
from forerun.workers.shared_memory import Segment


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


def export(
    run: RunFolder, recipe: Recipe, policy: Policy, drafter: Drafter | None, adapter: LoraAdapter | None
) -> dict[str, str]:
    """Write policy, drafter and adapter of a finished run to its folder `hf`; returns their folders.

    The adapter stands on the policy that the run began with, which has a name only where nothing was merged into it.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    folder = run.path / "hf"
    save_policy(policy, folder / "policy")
    paths = {"policy": str(folder / "policy")}
    with disk_errors(folder):
        if drafter is not None:
            drafter.save(folder / "drafter", {"run": run.path.name})
            paths["draft"] = str(folder / "drafter")
        if adapter is not None:
            merged = recipe.policy.adapter is not None or recipe.cold_start is not None
            adapter.save(folder / "adapter", None if merged else recipe.policy.model)
            paths["adapter"] = str(folder / "adapter")
    return paths
