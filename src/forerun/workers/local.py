"""Workers on the driver's machine: one Python process each, at the other end of a Unix socket.

A worker is in a session of its own: Ctrl-C is the driver's to handle. It dies with the driver (`server.end_with`): by
the kernel's parent-death signal, which follows the thread that started the process, hence a thread that only starts
them and lives as long as the launcher.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forerun.workers.handle import LOOPBACK, Spec, Worker, WorkerLost, kill_all, limit_blocking
from forerun.workers.server import PROGRAM

TAIL_BYTES = 2**16  # of stderr, in which the last line is looked for


class LocalLauncher:
    """The `Launcher` of this machine."""

    remote = False
    gpus = 0.0
    address = LOOPBACK

    def __init__(self, shared_memory: bool = True, program: str = PROGRAM, show_output: bool = False) -> None:
        """See the module.

        Args:
            shared_memory: workers get weights through memory that all of them map; else each gets a copy of its own.
            program: Python that runs in each, with the arguments of `server.main`.
            show_output: what they print goes to this process's stderr; else it is kept for the line they end with.
        """
        self.shared_memory, self.program, self.show_output = shared_memory, program, show_output
        self._starter = ThreadPoolExecutor(1, "launcher")

    def start(self, count: int, spec: Spec) -> list[Worker]:
        """See `Launcher`."""
        workers: list[Worker] = []
        try:
            for number in range(count):
                environment = spec.environments[number] if spec.environments else {}
                workers.append(self._starter.submit(self._start, spec, environment).result())
                workers[-1].make(spec, {name: str(path) for name, path in spec.files.items()}, spec.threads)
        except BaseException as error:
            kill_all(workers)
            if isinstance(error, WorkerLost):
                error.number = len(workers) - 1
            raise
        return workers

    def close(self) -> None:
        """See `Launcher`."""
        self._starter.shutdown()

    def _start(self, spec: Spec, environment: Mapping[str, str]) -> Worker:
        mine, theirs = socket.socketpair()
        limit_blocking(mine, spec.timeouts)
        output = os.fdopen(os.dup(2), "wb") if self.show_output else tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", self.program, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": str(max(1, spec.threads))} | dict(environment),
            )
        kept = not self.show_output
        return Worker(LocalProcess(process, output, kept), Connection(mine.detach()), spec.timeouts, self.shared_memory)


@dataclass(slots=True)
class LocalProcess:
    """The `Process` of a worker on this machine."""

    popen: subprocess.Popen[bytes]
    output: Any  # file of what it writes to stdout and stderr
    kept: bool = True  # the file is this process's alone
    address: str = LOOPBACK

    @property
    def pid(self) -> int:
        """See `Process`."""
        return self.popen.pid

    def kill(self) -> None:
        """See `Process`. What it has started itself ends with it, also in sessions of their own."""
        if self.popen.returncode is None:
            started = _descendants(self.popen.pid)
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.popen.kill()
        self.popen.wait()

    def end(self, timeout_s: float) -> str:
        """See `Process`."""
        try:
            code = self.popen.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return ""
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"

    def last_line(self) -> str:
        """See `Process`. What a killed process wrote last is not why it ended."""
        if not self.kept or self.output.closed or self.popen.returncode == -signal.SIGKILL:
            return ""
        size = os.fstat(self.output.fileno()).st_size
        text = os.pread(self.output.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

    def close(self) -> None:
        """See `Process`."""
        self.output.close()


def _descendants(pid: int) -> list[int]:
    """All processes that one has started, and those that these have; none where there is no /proc."""
    found = []
    with suppress(OSError):  # it has just ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found
