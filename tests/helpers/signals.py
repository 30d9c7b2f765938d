"""Signals of child processes."""

from __future__ import annotations

import signal


def hear_signals() -> None:
    """`preexec_fn` of a child that is to be stopped: a suite started by nohup, or in the background, ignores these, and
    what it starts inherits that.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
