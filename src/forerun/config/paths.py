"""The local files that a recipe names, looked for before anything is loaded or written."""

from __future__ import annotations

import re
from pathlib import Path

from forerun.artifacts import FOLDER, shipped
from forerun.config.recipe import Recipe
from forerun.errors import UserError

FROM_FOLDERS = ("eagle3", "mtp", "graft", "trie")  # drafters whose `speculation.draft` is a folder or an artifact

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILE_SUFFIXES = {".jsonl", ".json", ".parquet", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".txt", ".ndjson"}


def check_paths(recipe: Recipe, resume: bool = False) -> None:
    """Raises UserError when a file or folder is not there. A name on the hub is left to whoever loads it.

    Args:
        resume: policy, adapter and drafter come from a checkpoint.
    """
    task, speculation = recipe.task, recipe.speculation
    for key, place in {"task.path": task.path, "task.eval_path": task.eval_path}.items():
        if place is not None and not Path(place).exists() and not is_hub_name(place):
            raise UserError(f"{key}={place}: there is no such file or folder")
    if (texts := recipe.draft.texts) is not None and not Path(texts).is_file():
        raise UserError(f"draft.texts={texts}: there is no such file")
    if resume:
        return
    _check_folder("policy.model", recipe.policy.model, hub=True)
    _check_folder("policy.adapter", recipe.policy.adapter, hub=False)
    if speculation.tokens and speculation.method in (*FROM_FOLDERS, "model"):
        _check_folder("speculation.draft", speculation.draft, hub=speculation.method == "model")


def is_hub_name(place: str) -> bool:
    """Whether a name that is no path here may be a data set on the hub: owner/name, without a file's suffix."""
    return bool(HUB_NAME.fullmatch(place)) and Path(place).suffix.lower() not in FILE_SUFFIXES


def _check_folder(key: str, name: str | None, hub: bool) -> None:
    if name is None or Path(name).is_dir() or (FOLDER / name).is_dir():
        return
    local = name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1  # of the hub: owner/name
    if hub and local:
        raise UserError(f"{key}={name}: there is no such folder")
    if not hub:
        raise UserError(f"{key}={name}: there is no such folder, and no artifact that ships ({', '.join(shipped())})")
