"""One process at a time works in a run folder.

The lock is the kernel's (fcntl), held by the process and not by the file: one that a killed process left behind locks
nobody out. Not supported: systems without fcntl, where nothing is locked.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from forerun.errors import UserError
from forerun.tracking.files import disk_errors

FILE = ".lock"  # in a run folder: host and process id of who works there


class RunLock:
    """Of the run folder that is under way in this process."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor: int | None = None

    def take(self, run: Path) -> None:
        """Lock a run folder; a second time does nothing. Raises UserError when another process works there."""
        run = run.resolve()
        if self._path == run:
            return
        self.close()
        with disk_errors(run / FILE):
            descriptor = os.open(run / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{run} is under way in another process ({holder}); wait for it, or end it") from None
            raise UserError(f"{run} cannot be locked ({error.strerror}); choose another 'runs'") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} pid {os.getpid()}\n".encode(), 0)
        self._path, self._descriptor = run, descriptor

    def close(self) -> None:
        """Let others work there."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._path = self._descriptor = None


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        return
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
