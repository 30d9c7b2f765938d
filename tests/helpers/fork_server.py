"""A fork server: workers on this machine without the seconds that importing the libraries takes each of them.

The server is a process that has imported them. For every worker that `LocalLauncher` starts it forks a process that
takes over the descriptors, the environment and the folder, and runs the same program in a session of its own. The
kernel makes that process a child of the one that asked, so that waiting for it and its end with the parent are those
of a real child; but it ends with the parent's main thread, not with the thread that started it. Linux only.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

from forerun.workers import local

IMPORTS = (
    "forerun.learner.worker",
    "forerun.learner.cotrain_worker",
    "forerun.engine.local.engine",
    "forerun.engine.worker",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)
ABOVE = 300  # descriptors are kept there before they get the numbers that they are to have
MESSAGE_BYTES = 2**17
PR_SET_CHILD_SUBREAPER = 36


class ForkServer:
    """The client of a fork server; `popen` stands in for `subprocess.Popen`."""

    def __init__(self, fresh: bool = True) -> None:
        """`fresh`: the server is a new interpreter; else a fork of this process, which has imported everything."""
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if fresh:
                command = [sys.executable, __file__, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            elif os.fork() == 0:
                self._connection.close()
                serve(theirs)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Local workers come from this server."""
        stand_in = SimpleNamespace(
            Popen=self.popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
        )
        with mock.patch.object(local, "subprocess", stand_in):
            yield

    def popen(self, command: list[str], **settings: Any) -> ForkedProcess:
        """Start a process as `subprocess.Popen` would. Raises ConnectionError when the server is gone."""
        assert command[:2] == [sys.executable, "-c"] and settings["start_new_session"]
        assert settings["stdin"] == subprocess.DEVNULL
        passed = list(settings["pass_fds"])
        request = {"arguments": command[2:], "passed": passed, "env": dict(settings["env"]), "folder": os.getcwd()}
        files = [settings["stdout"].fileno(), settings["stderr"].fileno(), *passed]
        with self._lock, adopting_orphans():
            socket.send_fds(self._connection, [json.dumps(request).encode()], files)
            reply = self._connection.recv(MESSAGE_BYTES)
        if not reply:
            raise ConnectionError("the fork server is gone")
        return ForkedProcess(int(reply))

    def close(self) -> None:
        """End the server; workers stay."""
        self._connection.close()
        self._process.wait(timeout=60)


class ForkedProcess:
    """A child of this process, as `subprocess.Popen` shows one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, or minus the signal; None while it lives."""
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, when it has ended. Raises TimeoutExpired."""
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        """End it at once; a second time does nothing."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Descendants whose parents end become children of this process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def serve(connection: socket.socket) -> NoReturn:
    """Fork a worker per message, until the client is gone."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 16)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork() != 0:
                os._exit(0)  # its child becomes the client's
            while os.getppid() == between:
                time.sleep(0.0005)
            connection.send(str(os.getpid()).encode())
            connection.close()
            work(json.loads(message), files)
        for file in files:
            os.close(file)
        os.waitpid(between, 0)


def work(request: dict[str, Any], files: list[int]) -> NoReturn:
    """The life of a worker."""
    os.setsid()
    take_files(files, [1, 2, *request["passed"]])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    program, *arguments = request["arguments"]
    sys.argv, code = ["-c", *arguments], 0
    try:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def take_files(files: list[int], numbers: list[int]) -> None:
    """Give descriptors the numbers they have in the client; stdin is empty."""
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, ABOVE) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(above, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)


def main() -> None:
    """The server in an interpreter of its own: `descriptor of its socket`."""
    for name in IMPORTS:
        importlib.import_module(name)
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
