"""Processes forked before they are needed, each of which becomes one `python -c PROGRAM` that a run starts.

Importing the libraries takes longer than all that a tiny model does. A preforked process has imported them, waits, and
then does what a new interpreter would do: takes over the descriptors, the environment and the program, in a session of
its own. Fork them before anything is computed. When they run out, real interpreters are started.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

ABOVE = 300  # descriptors are put aside there before they get the numbers that they are to have


class Preforked:
    """`Popen` in place of `subprocess.Popen`."""

    def __init__(self, count: int) -> None:
        self._original = subprocess.Popen
        self._waiting: list[tuple[int, socket.socket]] = []
        for _ in range(count):
            mine, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                for other in [mine, *(s for _, s in self._waiting)]:
                    other.close()
                _wait_for_work(theirs)
            theirs.close()
            self._waiting.append((pid, mine))

    def arm(self) -> None:
        """From here on they are used."""
        subprocess.Popen = self.popen  # type: ignore[misc, assignment]

    def popen(self, command: Any, *more: Any, **settings: Any) -> Any:
        """What `subprocess.Popen` returns, or as much of it as a run uses."""
        ours = isinstance(command, list) and command[:2] == [sys.executable, "-c"] and settings.get("start_new_session")
        if not (ours and self._waiting):
            return self._original(command, *more, **settings)
        assert settings["stdin"] == subprocess.DEVNULL and not more
        passed = list(settings["pass_fds"])
        pid, connection = self._waiting.pop(0)
        request = {"arguments": command[2:], "passed": passed, "env": dict(settings["env"])}
        with connection:
            socket.send_fds(connection, [b"?"], [settings["stdout"].fileno(), settings["stderr"].fileno(), *passed])
            connection.sendall(json.dumps(request).encode())
        return PreforkedPopen(pid)


class PreforkedPopen:
    """A child that is at work, as `subprocess.Popen` shows one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal; None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, when it has ended. Raises TimeoutExpired."""
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a preforked process", timeout or 0.0)
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        """End it at once; a second time does nothing."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _wait_for_work(connection: socket.socket) -> None:
    """The life of a preforked process."""
    _, fds, _, _ = socket.recv_fds(connection, 1, 64)
    if not fds:
        os._exit(0)  # not needed: who forked it is gone
    with connection.makefile("rb") as file:
        request = json.loads(file.read())
    connection.close()
    os.setsid()
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, ABOVE) for fd in fds]
    for fd, number in zip(aside, [1, 2, *request["passed"]], strict=True):
        os.dup2(fd, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in [*aside, *(f for f in fds if f not in (1, 2, *request["passed"]))]:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
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
