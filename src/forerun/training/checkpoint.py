"""Checkpoints: policy, optimizer, drafter with its optimizer, random state and history of a run, whole or not at all.

A checkpoint is written as `step-N.partial` and renamed when everything in it has reached the disk. A folder without the
file `complete` (the size of every other file) is ignored; a broken one is renamed and the one before is used. The
learner writes `optimizer.pt`, or, sharded, the folder `learner`. With `train.lora` there is no `policy` but the `base`
that the run began with and the `adapter` on it, in peft's format: merged and rounded, they could not be separated.
The order of prompts and the engine's seeds follow from the step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError

from forerun.config import LoraConfig
from forerun.drafters import Drafter
from forerun.errors import UserError, WorkersLost
from forerun.learner.lora import LoraAdapter, read_settings
from forerun.models import Policy, save_policy
from forerun.tracking.files import disk_errors

MARK = "complete"
Loaded = TypeVar("Loaded")


class BrokenCheckpoint(UserError):
    """A checkpoint that cannot be used, and why."""


class Saved(Protocol):
    """A learner: `Learner` or `LearnerGroup`."""

    adapter: LoraAdapter | None

    def save(self, folder: Path) -> None:
        """Write its own state, without the policy, into the folder of a checkpoint."""

    def restore(self, folder: Path) -> None:
        """Inverse of `save`."""


class Resumable(Protocol):
    """What trains the drafter: `CoTrainer` or `GroupCoTrainer`."""

    def state_dict(self) -> dict[str, Any]:
        """Its own state, without the drafter: tensors, numbers and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    learner: Saved,
    drafter: Drafter | None,
    history: dict[str, Any],
    keep: int,
    cotrainer: Resumable | None = None,
) -> Path:
    """Write `folder/step-N` and drop all but the `keep` newest. `history` must be JSON.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target, scratch = folder / f"step-{step:06d}", folder / f"step-{step:06d}.partial"
    with disk_errors(folder):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        if learner.adapter is None:
            save_policy(policy, scratch / "policy")
        else:
            save_policy(policy, scratch / "base", learner.adapter.starting_state())
        with disk_errors(scratch):
            if drafter is not None:
                drafter.save(scratch / "drafter", {})
            learner.save(scratch)
            if cotrainer is not None:
                torch.save(cotrainer.state_dict(), scratch / "cotrain.pt")
            torch.save({"torch": torch.get_rng_state(), "python": random.getstate()}, scratch / "random.pt")
            (scratch / "history.json").write_text(json.dumps(history))
            (scratch / MARK).write_text(json.dumps({"step": step, "bytes": _sizes(scratch)}) + "\n")
            _flush(scratch)
            _put_in_place(scratch, target)
    except (UserError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(f"Cannot write the checkpoint {target}: {error}") from error
    except WorkersLost:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / MARK).is_file() and not p.suffix)


def newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run folder.

    Raises:
        UserError: there is none.
    """
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run} holds no complete checkpoint to resume from; start the run again")
    return found[-1]


def from_newest(run: Path, load: Callable[[Path], Loaded]) -> tuple[Loaded, list[str]]:
    """What `load` makes of the newest checkpoint that it can use, and a sentence for each that it passed over.

    Newer ones that cannot be used are renamed, so that none of them is taken for the newest later.

    Args:
        load: raises BrokenCheckpoint.

    Raises:
        UserError: there is no checkpoint, or none that can be used.
    """
    broken: list[str] = []  # not the errors, which hold on to half-loaded models
    newest = newest_checkpoint(run)
    for checkpoint in reversed(complete_checkpoints(newest.parent)):
        try:
            check_sizes(checkpoint)
            loaded = load(checkpoint)
        except BrokenCheckpoint as error:
            broken.append(str(error))
            continue
        for newer in [p for p in complete_checkpoints(newest.parent) if p.name > checkpoint.name]:
            shutil.rmtree(aside := newer.with_suffix(".broken"), ignore_errors=True)
            os.replace(newer, aside)
        passed_over = [*broken, *_cut_off(newest)]
        return loaded, [f"{sentence}; the run goes on from {checkpoint.name}" for sentence in passed_over]
    raise UserError(f"{broken[0]}; no other checkpoint of {run} can be used: start the run again")


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn errors while files of a checkpoint are read into BrokenCheckpoint."""
    try:
        yield
    except BrokenCheckpoint:
        raise
    except (UserError, OSError, EOFError, RuntimeError, KeyError, ValueError, TypeError, UnpicklingError,
            SafetensorError) as error:  # fmt: skip
        words = str(error).splitlines() or [type(error).__name__]
        raise BrokenCheckpoint(f"The checkpoint {checkpoint} cannot be used: {words[0]}") from error


def check_sizes(checkpoint: Path) -> None:
    """Compare the files with what was written. Raises BrokenCheckpoint. One without sizes is not compared."""
    with reading(checkpoint):
        mark = json.loads((checkpoint / MARK).read_text())
        expected: dict[str, int] = mark["bytes"] if isinstance(mark, dict) else {}
        for name, size in expected.items():
            held = (checkpoint / name).stat().st_size
            if held != size:
                raise BrokenCheckpoint(
                    f"The checkpoint {checkpoint} cannot be used: {name} has {held} bytes and was written with {size}"
                )


def read_history(checkpoint: Path) -> dict[str, Any]:
    """The history that was saved with a checkpoint. Raises BrokenCheckpoint."""
    with reading(checkpoint):
        return json.loads((checkpoint / "history.json").read_text())


def policy_folder(checkpoint: Path, lora: LoraConfig | None) -> Path:
    """The policy to load before `restore`: the checkpoint's, or the base of its adapter.

    Raises:
        UserError: the checkpoint was made with another `train.lora`. BrokenCheckpoint.
    """
    with reading(checkpoint):
        made = read_settings(checkpoint)
    if made != lora:
        before, now = ("null" if x is None else json.dumps(x.model_dump()) for x in (made, lora))
        raise UserError(
            f"The checkpoint {checkpoint} was made with train.lora={before}, and the recipe says {now}; go on with the "
            "former, or begin a run with the latter whose policy.model is an earlier run's hf/policy"
        )
    return checkpoint / ("policy" if lora is None else "base")


def restore(checkpoint: Path, learner: Saved, cotrainer: Resumable | None = None) -> None:
    """Put the learner, the drafter's optimizer and random state back (policy and drafter are loaded by themselves).

    A run that begins to train its drafter at a checkpoint made without begins with a new optimizer for it.

    Raises:
        BrokenCheckpoint: a file cannot be read.
    """
    with reading(checkpoint):
        learner.restore(checkpoint)
        if cotrainer is not None and (checkpoint / "cotrain.pt").exists():
            cotrainer.load_state_dict(torch.load(checkpoint / "cotrain.pt", map_location="cpu", weights_only=True))
        state = torch.load(checkpoint / "random.pt", map_location="cpu", weights_only=True)
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _put_in_place(scratch: Path, target: Path) -> None:
    """Rename, leaving at no time less than one whole checkpoint for longer than two renames take."""
    old = target.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(scratch, target)
    shutil.rmtree(old, ignore_errors=True)


def _cut_off(newest: Path) -> list[str]:
    """Of the checkpoints that were being written when the run ended."""
    partial = [p for p in newest.parent.glob("step-*.partial") if p.stem > newest.name]
    return [f"The checkpoint {p.stem} of {newest.parent} was cut off while it was being written" for p in partial]


def _flush(folder: Path) -> None:
    """Make the files reach the disk before the rename does."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
