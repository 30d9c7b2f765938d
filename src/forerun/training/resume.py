"""The recipe of a run that goes on (`--resume`), or of a new run on an earlier one's weights (`--from`).

What a checkpoint decides cannot be set anew: policy, drafter, kind of optimizer, reference of the KL penalty, split of
the data. Everything else holds from the next step on, and is written to the run's config.resolved.yaml.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from forerun.config import Recipe, load_recipe
from forerun.errors import UserError
from forerun.tracking.run_folder import RunFolder
from forerun.training.checkpoint import complete_checkpoints

FIXED = {  # keys, or the beginnings of keys -> why a resumed run keeps them
    "policy.model": "the policy is the checkpoint's",
    "policy.adapter": "the policy is the checkpoint's",
    "cold_start": "it was made before the first step",
    "speculation.draft": "the drafter is the checkpoint's",
    "train.optimizer": "the checkpoint holds the state of the other one",
    "seed": "the split of the data and the order of the prompts follow from it",
    "name": "the run has its folder",
    "runs": "the run has its folder",
} | {
    f"draft.{key}": "the drafter was trained before the first step"
    for key in ("rollouts", "texts", "epochs", "patience", "learning_rate", "batch_tokens", "vocab", "layers",
                "intermediate", "mtp_layers", "validation")
}  # fmt: skip


def resumed_recipe(folder: Path, overrides: dict[str, Any]) -> Recipe:
    """The recipe of an earlier run, with overrides (to train longer, say).

    Raises UserError when one of them cannot change in the midst of a run.
    """
    config = str(RunFolder.existing(folder).config)
    before, now = load_recipe(config), load_recipe(config, overrides)
    check_changes(before, now, folder)
    return now


def check_changes(before: Recipe, now: Recipe, folder: Path) -> None:
    """Raises UserError when `now` differs in what a checkpoint decides (`train.lora`: see `policy_folder`)."""
    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        fixed = next((part for part in FIXED if key == part or key.startswith(f"{part}.")), None)
        if fixed is not None and old.get(key) != new.get(key):
            _refuse(folder, key, old.get(key), new.get(key), FIXED[fixed])
    was, drafts = before.speculation, now.speculation
    if drafts.tokens and (was.tokens == 0 or drafts.method != was.method):
        key = "method" if drafts.method != was.method else "k"
        _refuse(
            folder, f"speculation.{key}", getattr(was, key), getattr(drafts, key), "its checkpoint has no such drafter"
        )
    if now.train.kl > 0 and before.train.kl == 0 and now.train.lora is None:
        why = (
            "the penalty is for the distance to the policy that the run began with, which the checkpoint does not hold"
        )
        _refuse(folder, "train.kl", 0, now.train.kl, why)


def _refuse(folder: Path, key: str, before: Any, now: Any, why: str) -> NoReturn:
    raise UserError(
        f"A resumed run cannot change {key} from {before} to {now}: {why}; go on without it, or start a new run on "
        f"this one's weights: forerun train RECIPE --from {folder}"
    )


def recipe_from(run: Path, recipe: str | None, overrides: dict[str, Any]) -> Recipe:
    """A recipe, or the run's own, with the policy and the drafter of a run as what a new run begins with.

    Raises UserError when the run has left no weights, or an override names others.
    """
    folder = RunFolder.existing(run)
    weights, drafter = newest_weights(folder.path)
    method = load_recipe(str(folder.config)).speculation.method
    chosen = load_recipe(recipe or str(folder.config), overrides)
    if drafter.is_dir() and chosen.speculation.tokens and chosen.speculation.method == method:
        weights["speculation.draft"] = str(drafter)
    if named := sorted(weights.keys() & overrides.keys()):
        raise UserError(f"--from {run} sets {named[0]}, and so does the command line; leave one of them out")
    return load_recipe(recipe or str(folder.config), {**overrides, **weights, "cold_start": None})


def newest_weights(run: Path) -> tuple[dict[str, Any], Path]:
    """Settings that load the policy of a run as it was last written down, and the folder of its drafter if it has one.

    That is its newest checkpoint, or what it left behind when it finished. Raises UserError when there is neither.
    """
    found = complete_checkpoints(run / "checkpoints")
    step = int(found[-1].name.removeprefix("step-")) if found else -1
    if (run / "hf" / "policy").is_dir() and _finished_steps(run) >= step:
        return {"policy.model": str(run / "hf" / "policy"), "policy.adapter": None}, run / "hf" / "drafter"
    if not found:
        raise UserError(f"{run} holds no weights to begin with: neither a checkpoint nor hf/policy")
    if (found[-1] / "base").is_dir():
        chosen = {"policy.model": str(found[-1] / "base"), "policy.adapter": str(found[-1] / "adapter")}
        return chosen, found[-1] / "drafter"
    return {"policy.model": str(found[-1] / "policy"), "policy.adapter": None}, found[-1] / "drafter"


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _finished_steps(run: Path) -> int:
    try:
        return int(json.loads((run / "summary.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1
