"""Checkpoints: policy, optimizer, drafter with its optimizer, random state and history of a run, whole or not at all.

A checkpoint is written beside its final name and renamed when everything in it has reached the disk; a folder without
`complete` was cut off and is ignored. The learner writes its own part: `optimizer.pt`, or, sharded, the folder
`learner`. Left out: the prompts' order and the engine's seeds, which follow from the step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from forerun.draft import Drafter
from forerun.errors import UserError
from forerun.learner.cotrain import CoTrainer
from forerun.models import Policy, save_policy
from forerun.report.metrics import disk_errors

MARK = "complete"


class Saved(Protocol):
    """A learner: `Learner` or `LearnerGroup`."""

    def save(self, folder: Path) -> None:
        """Write what it needs to go on, beside the policy itself, into the folder of a checkpoint."""

    def restore(self, folder: Path) -> None:
        """Inverse of `save`."""


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    learner: Saved,
    drafter: Drafter | None,
    history: dict[str, Any],
    keep: int,
    cotrainer: CoTrainer | None = None,
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
        save_policy(policy, scratch / "policy")
        if drafter is not None:
            drafter.save(scratch / "drafter", {})
        with disk_errors(scratch):
            learner.save(scratch)
            if cotrainer is not None:
                torch.save(cotrainer.state_dict(), scratch / "cotrain.pt")
            torch.save({"torch": torch.get_rng_state(), "python": random.getstate()}, scratch / "random.pt")
            (scratch / "history.json").write_text(json.dumps(history))
            (scratch / MARK).write_text(f"{step}\n")
            _flush(scratch)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(scratch, target)
    except (UserError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(f"Cannot write the checkpoint {target}: {error}") from error
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / MARK).is_file() and p.suffix != ".partial")


def newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run folder.

    Raises:
        UserError: there is none.
    """
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run} holds no complete checkpoint to resume from; start the run again")
    return found[-1]


def read_history(checkpoint: Path) -> dict[str, Any]:
    """The history that was saved with a checkpoint."""
    try:
        return json.loads((checkpoint / "history.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"The checkpoint {checkpoint} is broken: {error}; delete it to resume from the one before"
        ) from None


def restore(checkpoint: Path, learner: Saved, cotrainer: CoTrainer | None = None) -> None:
    """Put the learner, the drafter's optimizer and random state back (policy and drafter are loaded by themselves).

    A run that begins to train its drafter at a checkpoint made without begins with a new optimizer for it.
    """
    try:
        learner.restore(checkpoint)
        if cotrainer is not None and (checkpoint / "cotrain.pt").exists():
            cotrainer.load_state_dict(torch.load(checkpoint / "cotrain.pt", weights_only=True))
        state = torch.load(checkpoint / "random.pt", weights_only=True)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"The checkpoint {checkpoint} is broken: {error}; delete it to resume from the one before"
        ) from None
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _flush(folder: Path) -> None:
    """Make the files reach the disk before the rename does."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
