"""Weight sync: one version of policy and drafter on its way into workers, checked before anything changes.

Workers that share memory with the driver map the version, which is written once for all of them
(`shared_memory.py`). To the others it is sent in chunks: flat slices of tensors, gathered in the worker next to the
weights in use (one more copy of them meanwhile). Either way checksums are compared over the whole version: one that is
partial or damaged leaves the worker as it was. Each worker is served by a thread: a slow one delays no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock, Thread

import torch
from torch import Tensor

from forerun.errors import UserError
from forerun.models.checksum import checksum
from forerun.types import Weights
from forerun.workers.handle import Worker, WorkerLost
from forerun.workers.server import Server
from forerun.workers.shared_memory import Groups, Places, Segment, received
from forerun.workers.wire import CHUNK_BYTES, Message, send

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and number format
Slice = tuple[str, str, int]  # group, name of the tensor, first element
Answer = Message | WorkerLost | UserError


@dataclass(frozen=True, slots=True)
class Shared:
    """Where the tensors of a version are in shared memory, whose descriptor follows."""

    places: Places
    size_bytes: int


Layout = dict[str, Shapes] | Shared | None  # of what follows a load: pieces of groups, shared memory, nothing


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` and on of the flattened tensor `name` of a group."""

    group: str
    name: str
    start: int
    values: Tensor  # [n]


def shapes(state: Mapping[str, Tensor]) -> Shapes:
    """What is to be expected of a group."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def chunks(groups: Mapping[str, Mapping[str, Tensor]], size_bytes: int = CHUNK_BYTES) -> Iterator[list[Piece]]:
    """Lists of pieces of at most `size_bytes` together (and at least one element)."""
    return chunks_of(((group, name, t) for group, state in groups.items() for name, t in state.items()), size_bytes)


def chunks_of(tensors: Iterable[tuple[str, str, Tensor]], size_bytes: int = CHUNK_BYTES) -> Iterator[list[Piece]]:
    """The same of (group, name, tensor), which are taken one by one."""
    chunk: list[Piece] = []
    room = size_bytes
    for group, name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        start = 0
        while start < flat.numel():
            count = min(flat.numel() - start, max(1, room // flat.element_size()))
            chunk.append(Piece(group, name, start, flat[start : start + count]))
            start += count
            room -= count * flat.element_size()
            if room < flat.element_size():
                yield chunk
                chunk = []
                room = size_bytes
    if chunk:
        yield chunk


def send_pieces(connection: Connection, pieces: Sequence[Piece]) -> int:
    """Send a chunk: "pieces" with their places, then a frame of bytes for each. Returns the bytes. Raises OSError."""
    send(connection, "pieces", [(piece.group, piece.name, piece.start) for piece in pieces])
    sent = 0
    for piece in pieces:
        values = piece.values.cpu().contiguous().view(torch.uint8).numpy()
        connection.send_bytes(values.data)
        sent += values.nbytes
    return sent


@dataclass(slots=True)
class Staging:
    """The tensors that pieces are gathered in, and how many elements of each are missing."""

    tensors: dict[str, dict[str, Tensor]]
    missing: dict[tuple[str, str], int] = field(init=False)

    def __post_init__(self) -> None:
        self.missing = {(g, n): t.numel() for g, state in self.tensors.items() for n, t in state.items()}

    @classmethod
    def of(cls, groups: Mapping[str, Shapes]) -> Staging:
        """Room for groups."""
        return cls({g: {n: torch.empty(s, dtype=d) for n, (s, d) in state.items()} for g, state in groups.items()})

    def add(self, pieces: Iterable[Piece]) -> None:
        """Put pieces in their places."""
        for piece in pieces:
            flat = self.tensors[piece.group][piece.name].view(-1)
            flat[piece.start : piece.start + len(piece.values)] = piece.values.to(flat.device)
            self.missing[piece.group, piece.name] -= len(piece.values)

    def receive(self, connection: Connection, slices: Sequence[Slice]) -> None:
        """Take the frames that follow a "pieces" message. Raises EOFError, OSError."""
        for group, name, start in slices:
            dtype = self.tensors[group][name].dtype
            self.add([Piece(group, name, start, torch.frombuffer(bytearray(connection.recv_bytes()), dtype=dtype))])

    def check(self, expected: Mapping[str, str]) -> None:
        """Compare the groups as they arrived with the checksums that were announced.

        Raises:
            UserError: elements are missing, or came twice; or see `check_groups`.
        """
        for (group, name), count in self.missing.items():
            if count:
                raise UserError(f"{name} of the {group} arrived with {count} elements missing; send the version again")
        check_groups(self.tensors, expected)


def check_groups(groups: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, str]) -> None:
    """Compare tensors with the checksums of their groups.

    Raises:
        UserError: a group is damaged, or was not announced.
    """
    for group, state in groups.items():
        if (found := checksum(state)) != expected.get(group):
            raise UserError(
                f"The {group} weights have checksum {expected.get(group)}, but {found} arrived: the transfer was "
                "damaged, or the version was changed while it was sent"
            )


def receive_groups(server: Server, checksums: Mapping[str, str], layout: Layout) -> Groups:
    """In a worker: take the tensors that the driver sends with a version, and check them.

    Raises:
        UserError: they are partial or damaged. EOFError, OSError: the driver is gone.
    """
    if layout is None:
        return {}
    if isinstance(layout, Shared):
        groups = received(server.connection, layout.places, layout.size_bytes)
        server.send("receiving")
        check_groups(groups, checksums)
        return groups
    staging = Staging.of(layout)
    server.send("receiving")  # neither end sends while the other does
    while sum(staging.missing.values()) > 0:
        _, slices = server.receive()
        staging.receive(server.connection, slices)
    staging.check(checksums)
    return staging.tensors


class WeightSync:
    """In the driver: sends versions to workers, and counts the bytes it writes.

    A worker gets a request ("load", version, checksums, layout), answers "receiving" when it is ready for tensors, if
    there are any, and then "held" with the version and checksums that it holds.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        """`warn`: is called once when there is no room in shared memory."""
        self._warn = warn
        self._warned = False
        self._lock = Lock()
        self.written_bytes = 0  # of weights: into shared memory, unless they were published there, and to workers

    def send(self, weights: Weights, workers: Sequence[Worker]) -> Iterator[tuple[Worker, Answer]]:
        """Send a version to all; yields each worker when it is done, with its "held" message or why it has none."""
        segment = self._segment_for(weights, workers)
        done: SimpleQueue[tuple[Worker, Answer | BaseException]] = SimpleQueue()

        def serve(worker: Worker) -> None:
            answer: Answer | BaseException
            try:
                answer = self._load(worker, weights, segment if worker.shares_memory else None)
            except (WorkerLost, UserError) as error:
                answer = type(error)(str(error))  # without its frames, which hold the version
            except BaseException as error:
                answer = error
            done.put((worker, answer))

        for worker in workers:
            Thread(target=serve, args=(worker,), name="weights", daemon=True).start()
        for _ in workers:
            worker, answer = done.get()
            if not isinstance(answer, tuple | WorkerLost | UserError):
                raise answer
            yield worker, answer

    def _segment_for(self, weights: Weights, workers: Sequence[Worker]) -> Segment | None:
        """The version in shared memory; None where no worker could map it, or there is no room."""
        if not weights.groups or not any(worker.shares_memory for worker in workers):
            return None
        if weights.segment is not None:
            return weights.segment
        try:
            segment = Segment.of(weights.groups)
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"Version {weights.version} does not fit into shared memory ({error}): it is streamed to each "
                    "replica, which holds a copy of its own meanwhile; so are those that follow while there is no room"
                )
            self._warned = True
            return None
        self.written_bytes += segment.size_bytes
        return segment

    def _load(self, worker: Worker, weights: Weights, segment: Segment | None) -> Message:
        """One version to one worker; its "held" message. Raises WorkerLost, UserError."""
        version, checksums, groups = weights.version, dict(weights.checksums), weights.groups
        layout: Layout = {group: shapes(state) for group, state in groups.items()} or None
        if segment is not None:
            layout = Shared(segment.places, segment.size_bytes)
        worker.send("load", version, checksums, layout)
        try:
            if segment is not None:
                segment.send(worker.connection)
            if layout is not None:
                worker.await_reply("receiving", ("load",), worker.timeouts.heartbeat_s)
            for pieces in chunks(groups) if segment is None else ():
                sent = send_pieces(worker.connection, pieces)
                with self._lock:
                    self.written_bytes += sent
        except OSError as error:
            raise worker.lost(error) from None
        message = worker.await_reply("held", ("load",), worker.timeouts.start_s)
        if message[1:3] != (version, checksums):
            raise WorkerLost(f"says it holds version {message[1]} {message[2]} after a load of version {version}")
        return message
