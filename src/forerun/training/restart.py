"""Automatic restarts: a run that loses a worker goes on from its newest complete checkpoint, a limited number of times.

One that loses workers twice by the same exception, without a step in between, has a fault of its own: it ends.

The steps since that checkpoint are run again, as `--resume` does it; before the first checkpoint the run begins again
in the same folder. A loss of the driver itself is for `--resume`.
"""

from __future__ import annotations

from pathlib import Path

from forerun.errors import WorkersLost
from forerun.training.checkpoint import complete_checkpoints


class Restarts:
    """How often a run may still restart. A checkpoint newer than the one last used restores the whole allowance."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.made = 0
        self._folder: Path | None = None
        self._used = ""  # name of the checkpoint that the last restart used
        self._failure = ("", 0)  # the exception of the last loss, and the steps that were done then

    def grant(self, lost: WorkersLost, folder: Path | None, step: int = 0) -> tuple[Path, str]:
        """The folder of the run that may restart, and a warning.

        Args:
            folder: of the run that lost something; None when it did not get as far as having one.
            step: steps that were done.

        Raises:
            The exception itself: nothing was begun, the allowance is used up, or the run would end so again.
        """
        failure = (lost.failure, step)
        if lost.repeated or (lost.failure and failure == self._failure):
            raise lost
        self._failure = failure
        self._folder = folder or self._folder
        if self._folder is None:
            raise lost
        found = complete_checkpoints(self._folder / "checkpoints")
        newest = found[-1].name if found else "step 0"
        self.made = 1 if newest != self._used else self.made + 1
        self._used = newest
        if self.made > self.allowed:
            raise lost
        return self._folder, f"{lost}. The run goes back to {newest} (restart {self.made} of {self.allowed} from there)"
