"""How a run ends before its time: with a checkpoint of its last finished step, and a word on how to go on."""

from __future__ import annotations

import gc
import traceback
from pathlib import Path

import torch

from forerun.errors import Interrupted, UserError
from forerun.events import EventStream, Warned
from forerun.models.checks import require_finite
from forerun.training.checkpoint import complete_checkpoints
from forerun.training.state import Run

LESS_MEMORY = (
    "in generation lower rollout.slots or rollout.max_new_tokens; in the update lower train.microbatch_tokens, set "
    "train.gradient_checkpointing=true, or train an adapter (train.lora.rank=16); or spread the learner over GPUs with "
    "train.ranks"
)


def leave_checkpoint(current: Run) -> EventStream[None]:
    """Write a checkpoint of the last finished step, unless it has one, and say how to go on.

    None is written before the first step is finished, unless a cold start or a drafter's training came before it; nor
    when the policy is no longer that of the last finished step, or is not finite. Raises nothing: the run ends for a
    reason of its own.
    """
    step, path = current.history.step, current.folder.path
    held = _newest(path)
    trained = step > 0 or (path / "drafter").is_dir() or (path / "cold_start").is_dir()
    if trained and held != f"step-{step:06d}":
        if current.updates_recorded != current.learner.updates:
            yield Warned(f"the update of step {step + 1} was broken off in its midst: no checkpoint was written")
        else:
            try:
                require_finite("The policy", current.policy.model.named_parameters())
                yield from current.checkpoint()
            except (Exception, Interrupted) as error:  # a device that failed fails again
                yield Warned(f"no checkpoint of step {step} was written: {error}")
    try:
        current.timeline.close()
    except UserError as error:
        yield Warned(str(error))
    held = _newest(path)
    if held is not None:
        yield Warned(f"stopped after step {step}; go on from {held} with: forerun train --resume {path}")
    elif trained:
        yield Warned(f"stopped after step {step} without a checkpoint")


def as_sentence(error: Exception) -> Exception:
    """An error for which the user can do something as a UserError; any other as it is.

    The memory of an error's frames is given back.
    """
    if not _out_of_memory(error):
        return error
    text = " ".join(str(error).split(". ")[0].split())
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return UserError(f"Out of memory ({text}): {LESS_MEMORY}")


def _out_of_memory(error: Exception) -> bool:
    said = str(error)  # of the CPU's allocator: a plain RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in said


def _newest(run: Path) -> str | None:
    found = complete_checkpoints(run / "checkpoints")
    return found[-1].name if found else None
