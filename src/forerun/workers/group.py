"""Ranks: workers that carry out every request together, and live and die together.

They wait for each other, so one that ends makes the others fail, and one that hangs makes them hang. The group finds
out which one was first, names it, and ends all. A request is answered by one message of any kind; before it a rank may
send "progress" (sequences done so far) and "pieces" of tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor

from forerun.errors import UserError, WorkersLost
from forerun.events import CountStream, finish
from forerun.workers.handle import UNREACHABLE, Launcher, NotPlaced, Spec, Worker, WorkerLost, kill_all, poll
from forerun.workers.weights import Staging
from forerun.workers.wire import Message

TICK_S = 0.1  # the longest wait between two looks at all ranks
LOSS_S = 5.0  # until it is known which rank was lost first, when one is gone


class RanksLost(WorkersLost):
    """The ranks are gone, all of them: which one was lost first, and how it ended."""


class RankGroup:
    """Any method but `close` raises RanksLost."""

    def __init__(self, owner: str, launcher: Launcher, count: int, spec: Spec, copies: int = 1) -> None:
        """Start the ranks.

        Args:
            owner: of the ranks, for messages ("the learner").
            copies: consecutive ranks that do the same work, whose progress counts once.

        Raises:
            UserError: there is no room for them, or one refuses.
        """
        self.owner, self.count, self.copies = owner, count, copies
        self._launcher, self._timeouts = launcher, spec.timeouts
        self._done = [0] * count  # sequences of the request under way
        self._staging = Staging({})
        self._workers: list[Worker] = []
        try:
            self._workers = launcher.start(count, spec)
            self.pids = [worker.process.pid for worker in self._workers]  # each on its own machine
            self.addresses = [worker.process.address for worker in self._workers]
            check_refusals(finish(self._collect(spec.timeouts.start_s)))  # all are ready
        except NotPlaced as reason:
            self.close()
            raise UserError(f"{self._name(reason.number)} {reason}") from None
        except WorkerLost as reason:
            self.end(f"{self._name(reason.number)} {reason}", reason.failure)
        except BaseException:
            self.close()
            raise

    def run(
        self, requests: Sequence[Message], idle: Callable[[], None] = lambda: None, limit_s: float | None = None
    ) -> CountStream[list[Message]]:
        """Send each rank its request; yields the sequences that are done, returns the ranks' answers.

        Args:
            idle: called several times a second.
            limit_s: of silence; None: the heartbeat timeout.
        """
        if not self._workers:
            raise RanksLost(f"The ranks of {self.owner} were ended; start new ones")
        for rank, request in enumerate(requests):
            self._done[rank] = 0
            self._send(rank, request)
        return (yield from self._collect(limit_s or self._timeouts.heartbeat_s, idle))

    def ask(self, *request: Any) -> list[Any]:
        """The answers to a request that may take as long as the start. Raises UserError when a rank refuses."""
        answers = finish(self.run([request] * self.count, limit_s=self._timeouts.start_s))
        check_refusals(answers)
        return [answer[1] for answer in answers]

    def send_all(self, *request: Any) -> None:
        """A request that is not answered."""
        for rank in range(self.count):
            self._send(rank, request)

    def fetch(self, request: str, tensors: dict[str, Tensor]) -> None:
        """Have rank 0 send tensors, and put them in place of these."""
        self._staging = Staging({request: tensors})
        finish(self.run([(request,)] * self.count))
        incomplete = [name for (_, name), count in self._staging.missing.items() if count]
        self._staging = Staging({})
        if incomplete:
            self.end(f"{self._name(0)} sent {len(incomplete)} parameters only in part: {', '.join(incomplete)}")

    def end(self, reason: str, failure: str = "") -> NoReturn:
        """End all ranks for a reason; `failure`: the exception of a rank, if that is one."""
        self.close()
        raise RanksLost(f"{reason}; all {self.count} were ended", failure)

    def close(self) -> None:
        """End all ranks at once."""
        kill_all(self._workers)
        self._workers = []
        self._launcher.close()

    def _name(self, rank: int) -> str:
        return f"Rank {rank} of {self.owner}"

    def _send(self, rank: int, request: Message) -> None:
        try:
            self._workers[rank].send(*request)
        except WorkerLost as reason:
            self._lose(rank, reason)

    def _collect(self, limit_s: float, idle: Callable[[], None] = lambda: None) -> CountStream[list[Message]]:
        """One answer of every rank."""
        answers: dict[int, Message] = {}
        done = 0
        for worker in self._workers:
            worker.silent_s = 0.0
        while len(answers) < self.count:
            waiting = {id(worker): rank for rank, worker in enumerate(self._workers) if rank not in answers}
            for worker in poll([self._workers[rank] for rank in waiting.values()], TICK_S):
                done += self._receive(waiting[id(worker)], answers)
                yield done
            self._check_heartbeats([rank for rank in waiting.values() if rank not in answers], limit_s)
            idle()
        return [answers[rank] for rank in range(self.count)]

    def _receive(self, rank: int, answers: dict[int, Message]) -> int:
        """Act on a rank's next message; how many more sequences are done."""
        worker = self._workers[rank]
        try:
            message = worker.receive(0.0)
            if message[0] == "pieces":
                self._staging.receive(worker.connection, message[1])
            elif message[0] == "progress":
                more = max(0, message[1] - self._done[rank])
                self._done[rank] += more
                return more if rank % self.copies == 0 else 0
            else:
                answers[rank] = message
        except WorkerLost as reason:
            self._lose(rank, reason)
        except (EOFError, OSError) as error:
            self._lose(rank, worker.lost(error))
        return 0

    def _check_heartbeats(self, waiting: Sequence[int], limit_s: float) -> None:
        """The rank that fell silent first is the one that hangs."""
        if waiting:
            silent = max(waiting, key=lambda rank: self._workers[rank].silent_s)
            try:
                self._workers[silent].check_heartbeat(limit_s)
            except WorkerLost as reason:
                self.end(f"{self._name(silent)} {reason}")

    def _lose(self, rank: int, reason: WorkerLost) -> NoReturn:
        """A rank is lost: find out which was the first, and end all.

        One that went without a report was killed; those that failed because of it report so, and when.
        """
        workers = self._workers
        if not workers[rank].gone:
            self.end(f"{self._name(rank)} {reason}")
        until = time.perf_counter() + LOSS_S
        while True:
            for worker in workers:
                worker.drain()
            killed = [i for i, worker in enumerate(workers) if worker.gone and worker.failure is None]
            ended = [i for i in killed if workers[i].process.end(0.0)]
            known = ended == killed if killed else all(worker.gone for worker in workers)
            if known or time.perf_counter() > until:
                break
            time.sleep(0.02)
        failed = sorted((worker.failure[0], i) for i, worker in enumerate(workers) if worker.failure is not None)
        first = killed[0] if killed else failed[0][1] if failed else rank
        failure = workers[first].failure
        ending = workers[first].ending(0.0) or UNREACHABLE
        self.end(f"{self._name(first)} {ending}", "" if failure is None else failure[1])


def check_refusals(answers: Sequence[Message]) -> None:
    """Raises UserError when a rank has refused."""
    for message in answers:
        if message[0] == "refused":
            raise UserError(message[2])
