"""What travels between the driver and a worker: pickled tuples, the kind first, and raw frames of bytes.

Messages are pickled plainly: `Connection.send` would pass tensors in shared memory, through files that outlive a killed
process. Large data (weights, files) follows its message as frames of at most `CHUNK_BYTES`. The network must be
trusted: nothing is encrypted.
"""

from __future__ import annotations

import io
import pickle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 16 * 2**20
Message = tuple[Any, ...]


def send(connection: Connection, *message: Any) -> None:
    """Raises OSError when the other end is gone."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Message:
    """Raises EOFError or OSError when the other end is gone; what pickle raises when the bytes are no message."""
    message: Message = pickle.loads(connection.recv_bytes())
    if not isinstance(message, tuple) or not message:
        raise ValueError(f"{type(message).__name__} is no message")
    return message


def pack(thing: Any) -> bytes:
    """A module or a state for a message, whichever device its tensors are on."""
    import torch

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def unpack(data: bytes, device: torch.device | str = "cpu") -> Any:
    """Inverse of `pack`, with the tensors on `device`."""
    import torch

    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)


def send_file(connection: Connection, path: Path) -> None:
    """In frames of `CHUNK_BYTES`."""
    with path.open("rb") as file:
        while frame := file.read(CHUNK_BYTES):
            connection.send_bytes(frame)


def receive_file(connection: Connection, path: Path, size: int) -> None:
    """Inverse of `send_file` for a file of `size` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(connection.recv_bytes())
