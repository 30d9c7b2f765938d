"""Messages between the learner and its ranks: pickled tuples, the kind first.

Pickled plainly: `Connection.send` would hand tensors over in shared memory, through files that outlive a lost process.
"""

from __future__ import annotations

import io
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch

Message = tuple[Any, ...]


def send(connection: Connection, message: Message) -> None:
    """Raises OSError when the other end is gone."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Message:
    """Raises EOFError or OSError when the other end is gone."""
    message: Message = pickle.loads(connection.recv_bytes())
    return message


def packed(value: Any) -> bytes:
    """Tensors, or a module, as one part of a message."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes, device: torch.device | str = "cpu", whole_objects: bool = False) -> Any:
    """Inverse of `packed`. `whole_objects`: not only tensors in plain containers."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=not whole_objects)
