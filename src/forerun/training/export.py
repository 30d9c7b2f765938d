"""What a finished run leaves behind for other programs: policy, drafter and adapter in Hugging Face format."""

from __future__ import annotations

from forerun.config import Recipe
from forerun.drafters import Drafter
from forerun.learner.lora import LoraAdapter
from forerun.models import Policy, save_policy
from forerun.tracking.files import disk_errors
from forerun.tracking.run_folder import RunFolder


def export(
    run: RunFolder, recipe: Recipe, policy: Policy, drafter: Drafter | None, adapter: LoraAdapter | None
) -> dict[str, str]:
    """Write policy, drafter and adapter of a finished run to its folder `hf`; returns their folders.

    The adapter names its base model only where nothing else was merged into the policy.

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
