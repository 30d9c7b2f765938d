"""A rollout engine in a process of its own: what runs there (`serve`), and the parent's end of it (`Replica`).

A socket carries pickled tuples, the kind first; bytes of weights follow their header as they are, or lie in shared
memory whose descriptor follows (`shared_memory.py`). Between two rounds the replica tells that it lives, with what it
has counted, and takes orders: that is why a hung engine falls silent, and why weights can change in flight. When the
parent is gone it ends. Left out: who watches (`replicated.py`), and processes on other machines (`workers/ray.py`).

    to the replica    make, map (+ descriptor), begin, piece (+ bytes), commit, stream, pause, resume, abort
    from it           ready, held, round, rollout, done, refused: each with a `Status`; listening
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pickle import UnpicklingError
from typing import Any, Protocol

import torch

from forerun.engine.base import Counters, Requests, RolloutEngine, Sampling, Weights
from forerun.errors import UserError
from forerun.models.checksum import checksum
from forerun.workers.shared_memory import Groups, Places, Segment, received
from forerun.workers.weights import Piece, Shapes, Staging, chunks, compare, shapes

PROGRAM = "from forerun.engine.worker import main; main()"  # not -m: its records must be those of the module
CHUNK_BYTES = 16 * 2**20  # of weights per message
BEAT_S = 0.2  # between two signs of life
MAKER = "forerun.engine:load"
Message = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """How a replica makes its engine: `maker(engine, policy=, dtype=, speculation=, slots=)`."""

    engine: str
    policy: str  # folder
    dtype: str
    speculation: dict[str, Any]
    slots: int
    threads: int
    maker: str


@dataclass(frozen=True, slots=True)
class Status:
    """What a replica has counted since it was made, and warned of since its last message."""

    counters: Counters
    warnings: list[str]
    metrics: dict[str, Any]


class Aborted(Exception):
    """The parent does not want the rest of the stream."""


class Server:
    """Carries out orders until the parent is gone."""

    def __init__(self, connection: Connection, engine: RolloutEngine) -> None:
        self.connection, self.engine = connection, engine
        self._staging: Staging | None = None
        self._paused = self._streaming = False
        self._beat = time.perf_counter()

    def run(self) -> None:
        """Raises EOFError or OSError when the parent is gone."""
        self.tell("ready")
        while True:
            self.obey(self.connection.recv())

    def tell(self, kind: str, *content: Any) -> None:
        """A message, with the status."""
        warnings, self.engine.warnings[:] = list(self.engine.warnings), []
        self._beat = time.perf_counter()
        metrics = {k: v for k, v in self.engine.metrics().items() if k in ("drafter", "rule")}
        self.connection.send((kind, Status(self.engine.counters.copy(), warnings, metrics), *content))

    def obey(self, order: Message) -> None:
        """One order. What is the user's mistake is answered with `refused`."""
        kind, *content = order
        orders: dict[str, Callable[..., None]] = {
            "map": self.map, "begin": self.begin, "piece": self.piece, "commit": self.commit, "stream": self.stream,
            "pause": self.pause, "resume": self.resume, "abort": self.abort,
        }  # fmt: skip
        try:
            orders[kind](*content)
        except UserError as error:
            self.tell("refused", kind, str(error))

    # ---- weights ----

    def map(self, version: int, checksums: Mapping[str, str], places: Places, size_bytes: int) -> None:
        """Check a version that lies in shared memory, whose descriptor is the next message, and put it in use."""
        groups = received(self.connection, places, size_bytes)
        self.connection.send(("listening", None))
        compare({group: checksum(state) for group, state in groups.items()}, checksums)
        self._use(version, checksums, groups)

    def begin(self, groups: dict[str, Shapes]) -> None:
        """Make room for the tensors of a version and listen until it is there: nobody sends while the other does."""
        self._staging = Staging.of(groups)
        self.connection.send(("listening", None))
        while self._staging is not None:
            self.obey(self.connection.recv())

    def piece(self, group: str, name: str, start: int) -> None:
        """Take a piece: its bytes are the next message."""
        assert self._staging is not None
        dtype = self._staging.tensors[group][name].dtype
        values = torch.frombuffer(bytearray(self.connection.recv_bytes()), dtype=dtype)
        self._staging.add([Piece(group, name, start, values)])

    def commit(self, version: int, checksums: Mapping[str, str]) -> None:
        """Check the version and put it in use."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.check(checksums)
        self._use(version, checksums, staging.tensors if staging is not None else {})

    def _use(self, version: int, checksums: Mapping[str, str], given: Groups) -> None:
        held = self.engine.load(Weights(version, checksums, given.get("policy"), given.get("draft")))
        self.tell("held", held.version, dict(held.checksums))

    # ---- rollouts ----

    def stream(self, prompts: list[list[int]], sampling: Sampling, n: int, only: Requests) -> None:
        """Send rollouts as they finish, then `done`."""
        self._streaming = True
        try:
            for rollout in self.engine.stream(prompts, sampling, n, only, self.between):
                self.tell("rollout", rollout)
        except Aborted:
            pass  # the parent asked for it, and hears `done` as after a stream that ran out
        finally:
            self._streaming = self._paused = False
        self.tell("done")

    def between(self) -> None:
        """Between two rounds: a sign of life, and whatever was ordered meanwhile."""
        if time.perf_counter() - self._beat >= BEAT_S:
            self.tell("round")
        while self._paused or self.connection.poll():
            self.obey(self.connection.recv())

    def pause(self) -> None:
        """Wait before the next round of the stream under way."""
        self._paused = self._streaming

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self.engine.resume()

    def abort(self) -> None:
        """Leave the stream; without one there is nothing to leave."""
        if self._streaming:
            raise Aborted


def main() -> None:
    """The process on this machine."""
    serve(Connection(int(sys.argv[1])))


def serve(connection: Connection, placed: Callable[[Order], Order] = lambda order: order) -> None:
    """Make the engine that is ordered, and carry out orders until the parent is gone; then this process ends.

    Args:
        placed: the order with the paths that hold on this machine.
    """
    try:
        _, order = connection.recv()
        order = placed(order)
        torch.set_num_threads(order.threads)
        module, _, name = order.maker.partition(":")
        make = getattr(importlib.import_module(module), name)
        engine = make(
            order.engine, policy=order.policy, dtype=order.dtype, speculation=order.speculation, slots=order.slots
        )
        Server(connection, engine).run()
    except UserError as error:
        connection.send(("refused", None, "make", str(error)))
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone: nobody is left to tidy up for


# ---- the parent's end ----


@dataclass(frozen=True, slots=True)
class Patience:
    """When a replica is given up."""

    silence_s: float = 120.0  # without a word between two rounds
    start_s: float = 600.0  # until it has loaded its model
    losses: int = 3  # in a row in one place, in one stream or load; one more and the run stops


class Lost(Exception):
    """A replica cannot be used any more; the text goes on after its number."""


class Process(Protocol):
    """Whoever runs a replica, as its parent needs it."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """End it at once; a second time does nothing."""

    def end(self) -> str:
        """How it ended, with its last words; "" when it has not."""

    def close(self) -> None:
        """It is not needed any more, and its last words neither."""


@dataclass(slots=True)
class LocalProcess:
    """On this machine."""

    popen: subprocess.Popen[bytes]
    errors: Any  # file of what it wrote to stderr

    @property
    def pid(self) -> int:
        return self.popen.pid

    def kill(self) -> None:
        """See `Process`."""
        self.popen.kill()
        self.popen.wait()

    def end(self) -> str:
        """See `Process`."""
        try:
            code = self.popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return ""
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{end}: {lines[-1].strip()}" if lines and code != -signal.SIGKILL else end  # none has last words then

    def close(self) -> None:
        """See `Process`."""
        self.errors.close()


@dataclass(slots=True, eq=False)
class Replica:
    """The parent's end of one process."""

    process: Process
    connection: Connection
    shares_memory: bool = False  # it is on this machine, at the other end of a Unix socket
    busy: bool = False  # in a stream
    sent_bytes: int = 0  # of weights, into the connection, since it was last asked
    silent_s: float = 0.0  # listened to in vain
    counted: Counters = field(default_factory=Counters)  # in its last status
    metrics: dict[str, Any] = field(default_factory=dict)
    inbox: deque[Message] = field(default_factory=deque)  # heard while something else was waited for

    @classmethod
    def start(cls, order: Order, patience: Patience) -> Replica:
        """A process that begins to load its model. It is in a session of its own: Ctrl-C is the parent's to handle."""
        mine, theirs = socket.socketpair()
        impatient(mine, patience)
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the replica)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": str(order.threads)},
            )  # fmt: skip
        replica = cls(LocalProcess(process, errors), Connection(mine.detach()))
        replica.send("make", order)
        return replica

    def send(self, *order: Any) -> None:
        """Raises Lost."""
        try:
            self.connection.send(order)
        except OSError as error:
            raise Lost(self._last_words(error)) from None

    def give(self, weights: Weights, segment: Segment | None, patience: Patience) -> Status:
        """A version, in pieces unless it lies in `segment` and can be mapped, until it is held.

        Raises:
            Lost: it died, was silent, or holds something else. UserError: it refused.
        """
        try:
            if segment is not None and self.shares_memory:
                self._hand_over(weights, segment, patience.silence_s)
            else:
                self._send_pieces(weights, patience.silence_s)
        except OSError as error:
            raise Lost(self._last_words(error)) from None
        _, status, version, held = self.await_reply("held", patience.start_s)
        if version != weights.version or held != dict(weights.checksums):
            raise Lost(f"says it holds version {version} {held} after a load of version {weights.version}")
        return status  # type: ignore[no-any-return]

    def _hand_over(self, weights: Weights, segment: Segment, timeout_s: float) -> None:
        self.send("map", weights.version, dict(weights.checksums), segment.places, segment.size_bytes)
        segment.send(self.connection)
        self.await_reply("listening", timeout_s)

    def _send_pieces(self, weights: Weights, timeout_s: float) -> None:
        if groups := weights.groups:
            self.send("begin", {g: shapes(s) for g, s in groups.items()})
            self.await_reply("listening", timeout_s)
        for pieces in chunks(groups, CHUNK_BYTES):
            for piece in pieces:
                values = piece.values.cpu().contiguous().view(torch.uint8).numpy()
                self.connection.send(("piece", piece.group, piece.name, piece.start))
                self.connection.send_bytes(values.data)
                self.sent_bytes += values.nbytes
        self.send("commit", weights.version, dict(weights.checksums))

    def hear(self, timeout_s: float) -> Message:
        """Its next message. Raises Lost when it is dead, or silent for `timeout_s`."""
        try:
            if not self.connection.poll(timeout_s):
                raise Lost(f"has been silent for {timeout_s:.0f} s")
            message: Message = self.connection.recv()
        except (EOFError, OSError) as error:
            raise Lost(self._last_words(error)) from None
        except (UnpicklingError, ValueError, TypeError, AttributeError, ImportError, IndexError) as error:
            raise Lost(f"talks nonsense: {error}") from None
        self.silent_s = 0.0
        return message

    def wait(self, seconds: float, limit_s: float) -> None:
        """Note that it was listened to in vain. Raises Lost when that makes too long a silence."""
        self.silent_s += seconds
        if self.silent_s > limit_s:
            raise Lost(f"has been silent for {self.silent_s:.0f} s")

    def await_reply(self, kind: str, timeout_s: float) -> Message:
        """The answer to an order; what belongs to the stream under way is kept for it.

        Raises:
            Lost: it died, or gave no answer in time. UserError: it refused.
        """
        while True:
            message = self.hear(timeout_s)
            if message[0] == "refused" and message[2] != "stream":
                raise UserError(message[3])
            if message[0] == kind:
                return message
            self.inbox.append(message)

    def kill(self) -> None:
        """End it at once."""
        self.busy = False
        self.connection.close()
        self.process.kill()
        self.process.close()

    def _last_words(self, error: BaseException) -> str:
        """How it ended, if it did."""
        return self.process.end() or f"cannot be talked to: {type(error).__name__} {error}".rstrip()


class Starter(Protocol):
    """Where the processes of replicas come from."""

    def begin(self, order: Order, patience: Patience) -> Callable[[], Replica]:
        """Let one begin; the function waits until it can be talked to, and raises Lost."""

    def close(self) -> None:
        """No more will be needed, nor any that has only begun."""


@dataclass(frozen=True, slots=True)
class OnThisMachine:
    """The `Starter` of processes of this one."""

    shared_memory: bool = True  # versions are laid down once for all of them; else each gets a stream and keeps a copy

    def begin(self, order: Order, patience: Patience) -> Callable[[], Replica]:
        """See `Starter`."""
        replica = Replica.start(order, patience)
        replica.shares_memory = self.shared_memory
        return lambda: replica

    def close(self) -> None:
        """Nothing is kept."""


def impatient(end: socket.socket, patience: Patience) -> None:
    """A replica that stops in mid-message must not stop its parent, whose end of the socket this is."""
    limit = struct.pack("ll", int(patience.silence_s) + 1, 0)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)
