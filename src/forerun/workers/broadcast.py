"""One weight version to many replicas at the same time, each in a thread of its own: a slow one holds up no other.

Replicas of this machine get it out of shared memory (`shared_memory.py`), in which it is laid down once for all of
them: this process writes it once, and all check it and put it in use side by side. To the others it is streamed
(`worker.py`); the streams share the network. Left out: replicas that pass a version on to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread

from forerun.engine.base import Weights
from forerun.engine.worker import Lost, Patience, Replica, Status
from forerun.errors import UserError
from forerun.workers.shared_memory import Segment

Answer = Status | Lost | UserError


class Broadcast:
    """Sends versions, and counts what it wrote."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """Args: warn: is told once that there is no room in shared memory."""
        self._warn, self._warned = warn, False
        self.written_bytes = 0  # of weights: into shared memory, unless they were published there, and into connections

    def send(
        self, weights: Weights, replicas: Sequence[Replica], patience: Patience
    ) -> Iterator[tuple[Replica, Answer]]:
        """The replicas in the order in which they are done, with their answers, see `Replica.give`."""
        segment = self._laid(weights, replicas)
        for replica, answer in at_once(lambda r: r.give(weights, segment, patience), replicas):
            self.written_bytes += replica.sent_bytes
            replica.sent_bytes = 0
            yield replica, answer

    def _laid(self, weights: Weights, replicas: Sequence[Replica]) -> Segment | None:
        """The version in shared memory; None: none of these replicas could map it, or there is no room."""
        if not weights.groups or not any(replica.shares_memory for replica in replicas):
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


def at_once(action: Callable[[Replica], Status], replicas: Sequence[Replica]) -> Iterator[tuple[Replica, Answer]]:
    """What an action on each of the replicas came to, in the order in which they end."""
    ended: SimpleQueue[tuple[Replica, Answer | BaseException]] = SimpleQueue()

    def act(replica: Replica) -> None:
        answer: Answer | BaseException
        try:
            answer = action(replica)
        except (Lost, UserError) as error:
            answer = type(error)(str(error))  # without the frames, which hold the version
        except BaseException as error:
            answer = error
        ended.put((replica, answer))

    for replica in replicas:
        Thread(target=act, args=(replica,), name="weights", daemon=True).start()
    for _ in replicas:
        replica, answer = ended.get()
        if not isinstance(answer, Status | Lost | UserError):
            raise answer
        yield replica, answer
