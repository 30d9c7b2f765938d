"""Messages between the learner and its ranks: pickled tuples, the kind first.

Pickled plainly: `Connection.send` would hand tensors over in shared memory, through files that outlive a lost process.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any

Message = tuple[Any, ...]


def send(connection: Connection, message: Message) -> None:
    """Raises OSError when the other end is gone."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Message:
    """Raises EOFError or OSError when the other end is gone."""
    message: Message = pickle.loads(connection.recv_bytes())
    return message
