"""Folders of processes that were killed are removed, those of living ones are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from forerun.workers import scratch
from forerun.workers.scratch import PREFIX, ScratchFolder, sweep

OWNER = "from forerun.workers.scratch import ScratchFolder; f = ScratchFolder(); print(f.path, flush=True); input()"


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "YOUNG_S", -1.0)
    yield


def owner() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.skipif(scratch.fcntl is None, reason="this system has no flock")
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    process, folder = owner()
    try:
        (folder / "weights").write_bytes(bytes(1000))
        with ScratchFolder() as mine:
            assert folder.parent == mine.parent == tmp_path and (folder / "weights").exists()  # its owner lives
            process.send_signal(signal.SIGKILL)
            process.wait()
            sweep()
            assert not folder.exists() and mine.exists()
        assert list(tmp_path.glob(f"{PREFIX}*")) == []
    finally:
        process.kill()


@pytest.mark.skipif(scratch.fcntl is None, reason="this system has no flock")
def test_what_was_left_in_the_middle_of_its_removal_is_removed(tmp_path: Path) -> None:
    """The lock was the first file to go."""
    half = Path(tempfile.mkdtemp(prefix=PREFIX))
    (half / "weights").write_bytes(bytes(1000))
    sweep()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_have_just_been_made_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "YOUNG_S", 60.0)
    young = Path(tempfile.mkdtemp(prefix=PREFIX))
    (young / scratch.LOCK).touch()
    sweep()
    assert young.exists()


def test_closing_twice_does_nothing() -> None:
    folder = ScratchFolder()
    folder.close()
    folder.close()
    assert not folder.path.exists()
