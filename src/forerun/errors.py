"""How a run ends early: by a mistake of the user's or a loss (exit code 2), or by a signal (128 and its number)."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A mistake in a recipe, a file or a model, in one sentence: what, where, and what to do."""


class Interrupted(Exception):
    """A stop was asked for. Raised at a safe point: the policy is that of the last finished step."""

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
