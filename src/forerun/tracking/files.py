"""Files that a crash or a full disk leaves whole: atomic replacement, and disk errors as one sentence."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from forerun.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path`, or the error that safetensors makes of one, into one sentence.

    Raises:
        UserError: the disk or quota is full, or the path cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise _unwritten(path, error.errno, error.strerror) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise _unwritten(path, int(number[1]) if number else None, str(error)) from error


def _unwritten(path: Path, number: int | None, reason: str | None) -> UserError:
    if number in _FULL:
        return UserError(
            f"No space left while writing {path}: free space there or choose another folder, then resume the run; "
            "what was written before is intact."
        )
    return UserError(f"Cannot write {path} ({reason}): check that the folder exists and is yours.")


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that replaces `path` when the context ends; a reader, or a crash, sees the old file or the new one.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is kept.
    """
    draft = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
