"""Whether ranks on other machines see the run folder, where all of them write checkpoints."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forerun.tracking.files import disk_errors


@contextmanager
def probe_file(folder: Path) -> Iterator[tuple[Path, str]]:
    """A file whose name and content nobody else can know, in the folder for the while."""
    file = folder.absolute() / f".seen-{secrets.token_hex(8)}"
    content = secrets.token_hex(16)
    try:
        with disk_errors(file):
            file.write_text(content)
        yield file, content
    finally:
        file.unlink(missing_ok=True)


def folder_fault(file: Path, content: str) -> str:
    """What a rank cannot do with the folder of a probe file; "" when it can do all that it must."""
    try:
        seen = file.read_text() == content
    except OSError:
        seen = False
    if not seen:
        return "does not see"
    return "" if os.access(file.parent, os.W_OK | os.X_OK) else "may not write to"
