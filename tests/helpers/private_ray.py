"""How tests start a Ray of their own: what a private one needs, and a cluster that outlives its drivers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_S = 120.0


@contextmanager
def ray_settings(*folders: Path) -> Iterator[None]:
    """Actors find the modules in these folders; a private Ray needs no token."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's own is 15, which gets nothing on a busy machine
        yield


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", short)
        yield Path(short)


@contextmanager
def ray_cluster(cpus: int, folder: Path) -> Iterator[str]:
    """One machine's cluster, of so many CPUs, on its loopback alone; its address, for processes begun meanwhile.

    Args:
        folder: where it writes what it says; its processes have it for their temporary files, and in `RAY_TESTS_IN`.
    """
    with ray_folder() as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # 0: the machine's address is its loopback
        own = {"RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(folder), "RAY_TESTS_IN": str(folder)}
        words = ["--head", "--port=0", f"--num-cpus={cpus}", f"--object-store-memory={100 * 2**20}", "--block",
                 "--include-dashboard=false", "--min-worker-port=0", "--max-worker-port=0"]  # fmt: skip
        with (folder / "ray.txt").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *words],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=os.environ | own,
            )  # fmt: skip
        try:
            yield _address(process, short / "ray" / "ray_current_cluster", folder / "ray.txt")
        finally:
            process.terminate()  # it ends the others
            try:
                process.wait(timeout=60)
            finally:
                process.kill()


def _address(process: subprocess.Popen[bytes], place: Path, said: Path) -> str:
    """What a cluster writes down when it has begun."""
    until = time.monotonic() + START_S
    while not (place.exists() and (address := place.read_text().strip())):
        assert process.poll() is None and time.monotonic() < until, f"no Ray cluster: {said.read_text()}"
        time.sleep(0.1)
    return address
