"""Where rows come from: a file, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from forerun.config import TaskConfig
from forerun.config.paths import is_hub_name
from forerun.errors import UserError
from forerun.tasks.base import Problem, Split
from forerun.tasks.files import Row, read_rows
from forerun.tasks.splits import hold_out


def read_source(path: str, subset: str | None, split: str) -> list[Row]:
    """The rows of a file, of a folder (as `datasets` reads it), or of owner/name on the hub.

    Raises UserError when there is none, or it cannot be read or reached.
    """
    place = Path(path)
    if place.is_dir():
        return _dataset(path, subset, split, place)
    if not place.exists() and is_hub_name(path):
        return _dataset(path, subset, split, None)
    return read_rows(path)


def problems_of_split(config: TaskConfig, split: Split, make: Callable[[Row, str, str], Problem]) -> list[Problem]:
    """All problems of a split: of a file or split of its own, or else of the tenths of `task.path`."""
    assert config.path is not None
    own = config.eval_path is not None or config.eval_split is not None
    held_out = own and split == "eval"
    path = config.eval_path if held_out and config.eval_path is not None else config.path
    part = config.eval_split if held_out and config.eval_split is not None else config.split
    rows = read_source(path, config.subset, part)
    stem = Path(path).name.split(".")[0]
    problems = [make(row, f"Row {i} of {path}", f"{stem}/{i - 1}") for i, row in enumerate(rows, 1)]
    return problems if own else hold_out(problems, split)


def _dataset(path: str, subset: str | None, split: str, folder: Path | None) -> list[Row]:
    import datasets

    try:
        if folder is not None and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
            saved = datasets.load_from_disk(path)
            return list(saved[split] if isinstance(saved, datasets.DatasetDict) else saved)
        return list(datasets.load_dataset(path, subset, split=split))
    except Exception as error:  # of any library below
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = f"The folder {path}" if folder is not None else f"'{path}' is no file, and the data set of that name"
        advice = (
            "set task.split and task.subset to what it has"
            if folder is not None
            else "check name and network, set task.subset and task.split, or download it and give its file or folder"
        )
        raise UserError(f"{place} cannot be loaded (split '{split}', subset {subset}): {why}; {advice}") from error
