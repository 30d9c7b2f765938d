"""The local files that a recipe names, looked for before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

from forerun.artifacts import FOLDER, shipped
from forerun.config.recipe import Recipe
from forerun.errors import UserError

FROM_FOLDERS = ("eagle3", "mtp", "graft", "trie")  # drafters whose `speculation.draft` is a folder or an artifact


def check_paths(recipe: Recipe, resume: bool = False) -> None:
    """Raises UserError when a file or folder is not there. A name on the hub is left to whoever loads it.

    Args:
        resume: policy, adapter and drafter come from a checkpoint.
    """
    task, speculation = recipe.task, recipe.speculation
    files = {"task.path": task.path, "task.eval_path": task.eval_path, "draft.texts": recipe.draft.texts}
    for key, file in files.items():
        if file is not None and not Path(file).is_file():
            raise UserError(f"{key}={file}: there is no such file")
    if resume:
        return
    _check_folder("policy.model", recipe.policy.model, hub=True)
    _check_folder("policy.adapter", recipe.policy.adapter, hub=False)
    if speculation.tokens and speculation.method in (*FROM_FOLDERS, "model"):
        _check_folder("speculation.draft", speculation.draft, hub=speculation.method == "model")


def _check_folder(key: str, name: str | None, hub: bool) -> None:
    if name is None or Path(name).is_dir() or (FOLDER / name).is_dir():
        return
    local = name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1  # of the hub: owner/name
    if hub and local:
        raise UserError(f"{key}={name}: there is no such folder")
    if not hub:
        raise UserError(f"{key}={name}: there is no such folder, and no artifact that ships ({', '.join(shipped())})")
