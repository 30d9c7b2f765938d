"""Signals that end a run: Ctrl-C, SIGTERM (preemption by SLURM, Kubernetes) and SIGHUP (the terminal is gone)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from forerun.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Whether the run has been asked to stop, and by which signal.

    Until `wait_for_safe_points` is called nothing would be lost, and the first signal raises Interrupted at once. From
    then on it is only noted, for the next safe point; a second one raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_safe_points = False

    def __call__(self) -> bool:
        return self.number is not None

    def wait_for_safe_points(self) -> None:
        """From here on a stop waits for a point at which the policy is that of a finished step."""
        self._at_safe_points = True

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """A signal has come."""
        again, self.number = self.number is not None, number
        if again:
            raise KeyboardInterrupt
        if not self._at_safe_points:
            raise Interrupted(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within, signals ask for a stop. One that the process was told to ignore, by nohup say, stays ignored."""
    request = StopRequest()
    before = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, request.ask)
    except ValueError:  # not in the main thread: the caller's own handling stays
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
