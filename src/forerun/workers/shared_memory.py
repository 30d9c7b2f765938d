"""One weight version in memory that every process of this machine can map, written once.

The memory has no name (memfd): its descriptor travels over a worker's Unix socket, and the kernel frees it when the
last process that holds it ends, however it ends. It is not bounded by the size of /dev/shm. Tensors follow each other,
group by group; a receiver may write, to pages of its own. A segment is never used for a second version. Not supported:
systems without memfd.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from forerun.errors import UserError

ALIGNMENT_BYTES = 64  # of every tensor
Groups = dict[str, dict[str, Tensor]]
Places = dict[str, dict[str, tuple[tuple[int, ...], torch.dtype, int]]]  # shape, number format, first byte


@dataclass(slots=True, weakref_slot=True)
class Segment:
    """Groups of tensors in shared memory, as their writer sees them."""

    places: Places
    tensors: Groups
    size_bytes: int
    _descriptor: int

    @classmethod
    def of(cls, groups: Mapping[str, Mapping[str, Tensor]]) -> Segment:
        """A copy of the groups.

        Raises:
            OSError: the system has no such memory, or no room for them.
        """
        places, size = _arranged(groups)
        descriptor = _room(size)
        tensors = _views(mmap.mmap(descriptor, size), places)
        segment = cls(places, tensors, size, descriptor)
        weakref.finalize(segment, os.close, descriptor)
        for group, state in groups.items():
            for name, tensor in state.items():
                tensors[group][name].copy_(tensor.detach())
        return segment

    def send(self, connection: Connection) -> None:
        """Share it with the process at the other end of a Unix socket. Raises OSError."""
        with _socket(connection) as end:
            socket.send_fds(end, [b"\0"], [self._descriptor])


def received(connection: Connection, places: Places, size_bytes: int) -> Groups:
    """The tensors of a segment that was sent; what is written to them stays in this process.

    Raises:
        EOFError: the sender is gone. UserError: the memory cannot be mapped.
    """
    with _socket(connection) as end:
        _, descriptors, _, _ = socket.recv_fds(end, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not descriptors:
        raise EOFError
    try:
        memory = mmap.mmap(descriptors[0], size_bytes, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"Shared memory of {size_bytes} bytes cannot be mapped: {error}") from None
    finally:
        os.close(descriptors[0])
    return _views(memory, places)


def _arranged(groups: Mapping[str, Mapping[str, Tensor]]) -> tuple[Places, int]:
    """Where each tensor goes, and the bytes of all (at least one)."""
    places, end = Places(), 0
    for group, state in groups.items():
        places[group] = {}
        for name, tensor in state.items():
            places[group][name] = (tuple(tensor.shape), tensor.dtype, end)
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return places, max(1, end)


def _room(size_bytes: int) -> int:
    """The descriptor of memory that is reserved at once: a later write cannot fail for want of room."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    descriptor = os.memfd_create(f"forerun-{os.getpid()}", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _views(memory: mmap.mmap, places: Places) -> Groups:
    """The tensors; the memory stays mapped as long as one of them lives."""
    return {group: {name: _view(memory, *place) for name, place in some.items()} for group, some in places.items()}


def _view(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)


def _socket(connection: Connection) -> socket.socket:
    """The connection's socket under another descriptor, which may be closed."""
    return socket.socket(fileno=os.dup(connection.fileno()))
