"""What runs in a worker: it makes an object, answers requests for it, and ends with its driver.

    to a worker    make factory arguments files threads; then the requests of the object's table
    from it        ready; refused request sentence; failed time line; then the replies of its methods

The object is made by a factory, `factory(server, *arguments)`, which returns its requests: a table of names and the
methods that carry them out. Methods reply with `Server.send`, as often as they like; any message is a heartbeat. A
UserError is answered with "refused"; any other exception ends the process, with "failed".
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from forerun.errors import UserError, place_of
from forerun.workers.wire import Message, receive, send

Requests = Mapping[str, Callable[..., None]]
PROGRAM = "from forerun.workers.server import main; main()"  # not -m: pickled classes must be those of the module
PR_SET_PDEATHSIG = 1


def nothing() -> None:
    """There are no files to remove."""


class Server:
    """The worker's end of its connection."""

    def __init__(self, connection: Connection, remove_files: Callable[[], None] = nothing) -> None:
        """`remove_files`: removes the copies that the worker got; called when they are not needed, perhaps twice."""
        self.connection, self.remove_files = connection, remove_files
        self.files: Mapping[str, str] = {}  # paths on this machine, by the names of `Spec.files`
        self.requests: Requests = {"make": self._make}
        self.sent_s = time.perf_counter()  # when it sent its last message

    def run(self) -> NoReturn:
        """Answer requests. Raises EOFError or OSError when the driver is gone."""
        while True:
            self.answer()

    def answer(self) -> None:
        """Wait for one request and carry it out."""
        kind, *content = receive(self.connection)
        try:
            self.requests[kind](*content)
        except UserError as error:
            self.send("refused", kind, str(error))

    def send(self, *message: Any) -> None:
        """To the driver, the kind first."""
        self.sent_s = time.perf_counter()
        send(self.connection, *message)

    def receive(self) -> Message:
        """A message that is no request, or is to be handled elsewhere."""
        return receive(self.connection)

    def pending(self) -> bool:
        """Whether a request waits."""
        return self.connection.poll()

    def _make(self, factory: str, arguments: tuple[Any, ...], files: Mapping[str, str], threads: int) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        self.files = files
        module, _, name = factory.partition(":")
        self.requests = getattr(importlib.import_module(module), name)(self, *arguments)
        self.send("ready")


def serve(connection: Connection, remove_files: Callable[[], None] = nothing) -> NoReturn:
    """A worker from start to end. It leaves without cleaning up: its peers may be gone, and would be waited for."""
    code = 1
    try:
        Server(connection, remove_files).run()
    except (EOFError, ConnectionError):
        code = 0  # the driver is gone
    except BaseException as error:
        failed_at = time.time()  # a peer's failure makes others fail: the first one is the cause
        traceback.print_exc()
        line = next(iter(str(error).strip().splitlines()), "")
        with contextlib.suppress(OSError):
            send(connection, "failed", failed_at, f"{type(error).__name__}: {line}{place_of(error)}")
    with contextlib.suppress(OSError):  # of a full disk
        remove_files()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, even if this process is stopped then.

    Elsewhere than on Linux a worker ends when its connection does, which a stopped one cannot notice.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(0)


def main() -> None:
    """A worker on the driver's machine: `socket, process id of the driver`.

    A signal to all processes of a job is for the driver, which still needs its workers to write a checkpoint.
    """
    end_with(int(sys.argv[2]))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))
