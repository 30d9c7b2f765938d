"""A run that loses a part of itself goes back to its newest whole checkpoint, by itself and not for ever.

What is lost with the part is the steps since that checkpoint: their log lines are taken back and they are run again, as
`--resume` does it. Before the first checkpoint the run begins again at step 0 in the same folder. Left out: the loss of
this process itself, after which `--resume` is somebody else's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from forerun.engine.replicated import ReplicasLost
from forerun.learner.distributed import RanksLost
from forerun.training.checkpoint import complete_checkpoints

LOST: tuple[type[Exception], ...] = (ReplicasLost, RanksLost)  # part of the run is gone; its checkpoints are not


class Restarts:
    """How often a run may still go back. A checkpoint that is newer than the one last used gives all of them again."""

    def __init__(self, allowed: int, warn: Callable[[str], object]) -> None:
        self.allowed, self.made = allowed, 0
        self._warn = warn
        self._folder: Path | None = None
        self._used = ""  # name of the checkpoint that was gone back to

    def grant(self, lost: Exception, folder: Path | None) -> Path:
        """The folder of the run that may go back, with a warning.

        Args:
            folder: of the run that lost something; None when it did not get as far as having one.

        Raises:
            The exception itself: nothing was begun, or the allowance is used up.
        """
        self._folder = folder or self._folder
        if self._folder is None:
            raise lost
        found = complete_checkpoints(self._folder / "checkpoints")
        newest = found[-1].name if found else "step 0"
        self.made = 1 if newest != self._used else self.made + 1
        self._used = newest
        if self.made > self.allowed:
            raise lost
        self._warn(f"{lost}. The run goes back to {newest} (restart {self.made} of {self.allowed} from there)")
        return self._folder
