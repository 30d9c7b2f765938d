"""Temporary folders of a process; those of a killed process are removed by the next one.

A file lock marks a folder whose owner lives: the kernel releases it however the owner ends. On systems without flock
nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX, LOCK = "forerun-scratch-", "owner-lives"
YOUNG_S = 60.0  # a folder may not have its lock yet


class ScratchFolder:
    """A folder in the system's place for temporary files, until `close`."""

    def __init__(self) -> None:
        """Make one, and remove those whose owners are gone."""
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR)
        if fcntl is not None:
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove it; a second time does nothing."""
        if self.path.exists():
            os.close(self._lock)
            shutil.rmtree(self.path, ignore_errors=True)


def sweep() -> None:
    """Remove the scratch folders whose owners are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or removed meanwhile
            if time.time() - folder.stat().st_mtime > YOUNG_S and not _owned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _owned(folder: Path) -> bool:
    if fcntl is None:
        return True
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False  # its owner was killed while it removed the folder
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
