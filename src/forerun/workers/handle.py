"""The driver's handle of a worker process: messages, heartbeat timeout, and how the process ended.

A `Launcher` starts workers, here (`local.py`) or on other machines (`ray.py`); `server.py` is what runs in them. Any
message counts as a heartbeat. Whoever owns the workers decides what the loss of one means.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

from forerun.errors import UserError
from forerun.workers.wire import Message, receive, send

LOOPBACK = "127.0.0.1"
INVALID = (UnpicklingError, ValueError, TypeError, AttributeError, ImportError, IndexError)
UNREACHABLE = "cannot be reached"
END_S = 5.0  # from the end of a connection until it is known how the process ended


@dataclass(frozen=True, slots=True)
class Timeouts:
    """When a worker counts as lost."""

    heartbeat_s: float = 120.0  # without a message while it is at work
    start_s: float = 600.0  # until it is ready


@dataclass(frozen=True, slots=True)
class Spec:
    """What a worker serves: `factory` ("package.module:function") is called there as factory(server, *arguments)."""

    factory: str
    arguments: tuple[Any, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)  # files and folders it reads, see `Server.files`
    threads: int = 1  # of torch; 0: torch is left to the factory, with one
    timeouts: Timeouts = Timeouts()
    environments: Sequence[Mapping[str, str]] = ()  # added for each worker, on this machine; (): nothing


class WorkerLost(Exception):
    """A worker cannot be used any more. The text continues a sentence that begins with the worker's name."""

    def __init__(self, reason: str, number: int = 0, failure: str = "") -> None:
        """See the class.

        Args:
            number: of the worker among those that were started together.
            failure: the exception that ended it, if one did.
        """
        super().__init__(reason)
        self.number, self.failure = number, failure


class NotPlaced(WorkerLost):
    """There was no room for a worker."""


class Process(Protocol):
    """The process of a worker, wherever it runs."""

    @property
    def pid(self) -> int:
        """On its own machine."""

    @property
    def address(self) -> str:
        """Of its machine, as other workers reach it."""

    def kill(self) -> None:
        """End it at once. May be called again."""

    def end(self, timeout_s: float) -> str:
        """How it ended, waiting for it so long; "" when it has not."""

    def last_line(self) -> str:
        """The last line it wrote to stderr; "" where that is unknown or says nothing about its end."""

    def close(self) -> None:
        """Release what is kept of it."""


class Launcher(Protocol):
    """Starts workers."""

    remote: bool  # workers may be on other machines: files are copied to them, and each sees only its own GPUs
    gpus: float  # of each worker, where it is remote
    address: str  # of the driver's machine, as workers reach it

    def start(self, count: int, spec: Spec) -> list[Worker]:
        """Start `count` workers at the same time; each sends "ready" when it has called its factory.

        Raises:
            WorkerLost: one could not be started, and none is. UserError: there is nowhere to start one.
        """

    def close(self) -> None:
        """Release what was reserved. The owner has killed the workers."""


@dataclass(slots=True, eq=False)
class Worker:
    """One worker as the driver sees it. Not thread-safe."""

    process: Process
    connection: Connection
    timeouts: Timeouts
    shares_memory: bool = False  # a Unix socket leads to it, so that memory can be shared
    silent_s: float = 0.0  # since its last message, while somebody waited for one
    gone: bool = False  # its connection has ended
    failure: tuple[float, str] | None = None  # when it failed (its own clock), and how
    inbox: deque[Message] = field(default_factory=deque)  # received while another message was awaited

    def make(self, spec: Spec, files: Mapping[str, str], threads: int) -> None:
        """Have it call the factory; `files` are their paths on its machine. Raises WorkerLost."""
        self.send("make", spec.factory, spec.arguments, dict(files), threads)

    def send(self, *message: Any) -> None:
        """Raises WorkerLost."""
        try:
            send(self.connection, *message)
        except OSError as error:
            raise self.lost(error) from None

    def receive(self, timeout_s: float) -> Message:
        """Its next message. Raises WorkerLost when it is dead, has failed, or is silent for `timeout_s`."""
        try:
            if not self.connection.poll(timeout_s):
                raise WorkerLost(f"has been silent for {timeout_s:.0f} s")
            message = receive(self.connection)
        except (EOFError, OSError) as error:
            raise self.lost(error) from None
        except INVALID as error:
            raise WorkerLost(f"returned invalid output: {error}") from None
        self.silent_s = 0.0
        if message[0] == "failed":
            self.failure = (message[1], message[2])
            raise self.lost()
        return message

    def await_reply(self, kind: str, requests: Collection[str], timeout_s: float) -> Message:
        """The answer of this kind to one of `requests`; other messages are kept in `inbox`.

        Raises:
            WorkerLost: it died, or gave no answer in time. UserError: it refused.
        """
        while True:
            message = self.receive(timeout_s)
            if message[0] == kind:
                return message
            if message[0] == "refused" and message[1] in requests:
                raise UserError(message[2])
            self.inbox.append(message)

    def drain(self) -> None:
        """Read what it has sent, to know how it ended."""
        with suppress(WorkerLost, OSError):
            while not self.gone and self.connection.poll():
                self.receive(0.0)

    def check_heartbeat(self, limit_s: float) -> None:
        """Raises WorkerLost when it has been silent for longer."""
        if self.silent_s > limit_s:
            raise WorkerLost(f"has been silent for {self.silent_s:.0f} s")

    def lost(self, error: BaseException | None = None) -> WorkerLost:
        """Its connection has ended: why."""
        self.gone = True
        reason = "" if error is None else f": {type(error).__name__} {error}".rstrip()
        failure = "" if self.failure is None else self.failure[1]
        return WorkerLost(self.ending(END_S) or f"{UNREACHABLE}{reason}", failure=failure)

    def ending(self, timeout_s: float) -> str:
        """How the process ended, with what it reported or wrote last; "" when it is not known to have ended."""
        end = self.process.end(timeout_s)
        last = self.failure[1] if self.failure is not None else self.process.last_line() if end else ""
        return f"{end or UNREACHABLE}: {last}" if last else end

    def kill(self) -> None:
        """End it at once."""
        self.gone = True
        self.connection.close()
        self.process.kill()
        self.process.close()


def poll(workers: Sequence[Worker], timeout_s: float) -> list[Worker]:
    """The workers with a message, waiting for the first one; counts the silence of the others."""
    started = time.perf_counter()
    ready = set(wait([worker.connection for worker in workers], timeout_s))
    waited = min(time.perf_counter() - started, 2 * timeout_s)  # this process may have been suspended
    for worker in workers:
        if worker.connection not in ready:
            worker.silent_s += waited
    return [worker for worker in workers if worker.connection in ready]


def limit_blocking(end: socket.socket, timeouts: Timeouts) -> None:
    """Let no read or write on the driver's end of a socket outlast a worker that stops in the middle of a message."""
    limit = struct.pack("ll", int(timeouts.heartbeat_s) + 1, 0)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)


def kill_all(workers: Sequence[Worker]) -> None:
    """End all of them at once, not one after another."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.kill()
