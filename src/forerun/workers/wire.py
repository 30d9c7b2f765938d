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


def pack(thing: Any) -> bytes:
    """A module or a state, for a message: whichever device its tensors are on."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def unpack(data: bytes, device: torch.device | str = "cpu") -> Any:
    """Inverse of `pack`, its tensors on `device`."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)
