"""Reward workers: processes that compute rewards beside the generation, each answer within a deadline.

A worker is a fresh interpreter that builds the recipe's task and imports its rewards by their paths; it never forks the
driver, whose threads and locks a fork would copy. Functions of the driver's `__main__` (a script, a notebook) cannot be
imported elsewhere and are sent by value, with what they refer to. A worker that misses the deadline or dies is killed
and replaced, its answer counts 0, and no other answer is touched. Workers start when answers wait for one, and end with
the driver; what rewards print goes to the driver's stderr. Imports are not under the deadline: it begins when a worker
is ready.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, LifoQueue
from typing import Any

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks import has_own_reward, load_task
from forerun.tasks.base import Completion, WeightedReward
from forerun.tasks.scoring import Score, score
from forerun.tracking.environment import usable_cores
from forerun.workers.handle import Spec, Timeouts, Worker, WorkerLost
from forerun.workers.local import LocalLauncher
from forerun.workers.server import Requests, Server

START_S = 120.0  # until a worker has imported the rewards
STARTS = 3  # of a worker that is killed before it is ready
MOST_WORKERS = 8  # unless the recipe says otherwise
SPARE_S = 0.2  # that an answer waits for a worker before another one is started
LEAST_ANSWERS = 8  # of which a share is taken before failures stop a run
HEAD = 80  # characters of an answer that a warning shows


class RewardWorkers:
    """The reward workers of a run; threads may share it. Close it after use."""

    def __init__(self, config: TaskConfig, seed: int = 0) -> None:
        """Starts no process yet, see `warm_up`.

        Args:
            config, seed: of the task whose rewards are asked for.
        """
        self.config = config
        self.count = config.reward_workers or min(MOST_WORKERS, usable_cores())
        self.warnings: list[str] = []  # to be shown; `settle` adds the first failure and the first missed deadline
        self._spec = Spec(
            "forerun.tasks.workers:serve",
            (config, seed, list(sys.path), os.getcwd(), _by_value(config, seed)),
            threads=0,
            timeouts=Timeouts(config.reward_timeout_s, START_S),
        )
        self._launcher = LocalLauncher(show_output=True)
        self._threads = ThreadPoolExecutor(self.count, "rewards")  # one per worker, for as long as it has an answer
        self._idle: LifoQueue[Worker] = LifoQueue()
        self._all: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._recent: deque[bool] = deque(maxlen=LEAST_ANSWERS)  # whether rewards of the user's own failed
        self._shown: set[str] = set()  # outcomes that have been warned of

    def warm_up(self) -> None:
        """Start the first worker in the background."""
        self._threads.submit(self._warm_up)

    def submit(self, completion: Completion) -> Future[Score]:
        """Compute a completion's reward as soon as a worker is free. The result raises UserError if none can start."""
        return self._threads.submit(self._score, completion)

    def settle(self, completions: Sequence[Completion], scores: Sequence[Score]) -> None:
        """Take note of a step's failures. Raises UserError when too many of them are the user's own rewards'."""
        with self._lock:
            self._settle(completions, scores)

    def _settle(self, completions: Sequence[Completion], scores: Sequence[Score]) -> None:
        self._recent = deque(self._recent, maxlen=max(LEAST_ANSWERS, len(scores)))
        first = ""
        for completion, found in zip(completions, scores, strict=True):
            self._recent.append(found.outcome != "scored")
            if found.outcome == "scored":
                continue
            first = first or _told(completion, found)
            if found.outcome not in self._shown:
                self._shown.add(found.outcome)
                self.warnings.append(
                    f"{_told(completion, found)}; it counts 0; later ones are counted in reward/{found.outcome}"
                )
        failed, most = sum(self._recent), self.config.reward_failures
        if has_own_reward(self.config) and len(self._recent) >= LEAST_ANSWERS and failed > most * len(self._recent):
            raise UserError(
                f"{first or 'Rewards failed'}. That makes {failed} of the last {len(self._recent)} answers, more than "
                f"task.reward_failures={most} allows; mend the reward, or raise that share"
            )

    def close(self) -> None:
        """End the workers; answers under way are given up."""
        self._closed = True
        with self._lock:
            workers = list(self._all)
        for worker in workers:
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        with suppress(Empty):
            while True:
                self._idle.get_nowait().kill()
        self._launcher.close()

    def _score(self, completion: Completion) -> Score:
        worker = self._take()
        started = time.perf_counter()
        try:
            worker.send("score", completion)
            found = worker.receive(0.0) if worker.connection.poll(self.config.reward_timeout_s) else None
        except WorkerLost as lost:
            self._drop(worker)
            if self._closed:
                raise CancelledError from None
            fault = f"The process of the reward {lost}"
            return Score(0.0, time.perf_counter() - started, outcome="failed", fault=fault)
        if found is None:
            self._drop(worker)
            seconds = self.config.reward_timeout_s
            fault = f"The reward was not there after task.reward_timeout_s={seconds:g} s"
            return Score(0.0, time.perf_counter() - started, outcome="timeout", fault=fault)
        self._idle.put(worker)
        result: Score = found[1]
        return result

    def _warm_up(self) -> None:
        with suppress(UserError, CancelledError):  # raised again by the first answer
            self._idle.put(self._take())

    def _take(self) -> Worker:
        """An idle worker, or a new one where none becomes idle soon; one killed before it is ready is replaced."""
        with suppress(Empty):
            while (worker := self._idle.get(timeout=SPARE_S if self._all else 0.0)).connection.poll():
                self._drop(worker)  # it has ended while it was idle
            return worker
        for _ in range(STARTS - 1):
            with suppress(WorkerLost):
                return self._start()
        try:
            return self._start()
        except WorkerLost as error:
            raise UserError(f"A reward worker {error}, {STARTS} times before it was ready") from None

    def _start(self) -> Worker:
        """A new worker. Raises WorkerLost when it was killed before it was ready."""
        if self._closed:
            raise CancelledError
        try:
            worker = self._launcher.start(1, self._spec)[0]
        except (WorkerLost, OSError) as error:
            raise UserError(f"A reward worker cannot be started: {error}") from None
        with self._lock:
            self._all.add(worker)
        try:
            worker.await_reply("ready", ["make"], 0.0 if self._closed else START_S)
        except (WorkerLost, UserError) as error:
            self._drop(worker)
            if self._closed:
                raise CancelledError from None
            if isinstance(error, UserError) or (not error.failure and "killed by signal" in str(error)):
                raise
            raise UserError(f"A reward worker {error}") from None
        return worker

    def _drop(self, worker: Worker) -> None:
        worker.kill()
        with self._lock:
            self._all.discard(worker)


def serve(
    server: Server, config: TaskConfig, seed: int, path: list[str], folder: str, by_value: bytes | None
) -> Requests:
    """What runs in a worker: builds the rewards, as the driver would import them."""
    sys.path[:] = path
    os.chdir(folder)
    _be_first_to_go()
    _let_signals_end_children()
    rewards: Sequence[WeightedReward]
    if by_value is None:
        rewards = load_task(config, seed).rewards
    else:
        import dill

        rewards = dill.loads(by_value)
    if "forerun.tasks.reward" in sys.modules:  # what it imports late, before the first deadline begins
        from forerun.tasks.reward import math_reward

        math_reward("x+1", "#### 1+x")
    process = os.getpid()

    def answer(completion: Completion) -> None:
        found = score(rewards, completion)
        if os.getpid() != process:  # a child that a reward has forked, and that came back from it, has no say
            os._exit(0)
        sys.stdout.flush()  # what it printed: the worker may be killed as soon as it has answered
        server.send("scored", found)

    return {"score": answer}


def _by_value(config: TaskConfig, seed: int) -> bytes | None:
    """The rewards themselves where a path leads into the driver's `__main__`, which no worker can import."""
    if not any(path.startswith("__main__:") for path in (config.name, config.reward or "", *config.rewards)):
        return None
    import dill

    try:
        return bytes(dill.dumps(list(load_task(config, seed).rewards), recurse=True))
    except Exception as error:
        raise UserError(
            f"A reward of this script cannot be sent to a worker ({type(error).__name__}: {error}); move it into a "
            "file and name it file.py:function"
        ) from None


def _be_first_to_go() -> None:
    """When memory runs out, the kernel ends a reward worker and not the run."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _let_signals_end_children() -> None:
    """What a reward starts can be ended by SIGTERM: it would inherit that a worker ignores signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=partial(signal.signal, number, signal.SIG_DFL))


def _told(completion: Completion, found: Score) -> str:
    """A failure in one sentence without its full stop."""
    head: Any = " ".join(completion.text.split())
    head = head if len(head) <= HEAD else f"...{head[-HEAD:]}"
    return f"{found.fault} on problem '{completion.problem.id}' for the answer {head!r}"
