"""How a run ends early: by a mistake of the user's or a loss (exit code 2), or by a signal (128 and its number)."""

from __future__ import annotations

import signal
import sysconfig
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent
LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]


class UserError(Exception):
    """A mistake in a recipe, a file or a model, in one sentence: what, where, and what to do."""


class Interrupted(BaseException):
    """A stop was asked for. Raised at a safe point: the policy is that of the last finished step.

    No Exception, like KeyboardInterrupt: libraries that go on after any of those would go on after a signal, too.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        """`number`: of the signal."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = int(number)


class WorkersLost(Exception):
    """Workers are gone and were not replaced: ranks or replicas; the message is a sentence."""

    def __init__(self, reason: str, failure: str = "", repeated: bool = False) -> None:
        """See the class.

        Args:
            failure: the exception that ended one, with its file and line; "" where it was killed or fell silent.
            repeated: its successor ended by the same one: another would, too.
        """
        super().__init__(reason)
        self.failure, self.repeated = failure, repeated


def place_of(error: BaseException) -> str:
    """ " (file:line)" of an exception: the innermost line of the user's own code, or else of the package."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in LIBRARIES)]
    theirs = [f for f in own if not Path(f.filename).is_relative_to(PACKAGE)]
    found = (theirs or own or frames)[-1:]
    return "".join(f" ({f.filename}:{f.lineno})" for f in found)
