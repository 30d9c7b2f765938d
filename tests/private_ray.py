"""How tests start a Ray of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def ray_settings(*folders: Path) -> Iterator[None]:
    """Actors find the modules in these folders; a private Ray needs no token."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's own is 15, which gets nothing on a busy machine
        yield
