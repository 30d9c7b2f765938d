"""The asynchronous source of rollouts: generation runs ahead of learning, by at most `loop.lag` weight versions.

A thread generates the steps' rollouts in their order. It begins step s (0-based) as soon as version s - lag has been
published, with the newest version there is, so every token that step s trains on is at most `lag` versions old and at
most `lag` + 1 steps wait. With `loop.in_flight` a version that appears meanwhile takes over between two rounds, and
each token carries its own. An evaluation by the same engine takes place between two steps of the thread. A resumed run
generates unfinished steps again, by the weights that it then has.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from forerun.engine import RolloutEngine, Weights
from forerun.errors import Interrupted
from forerun.events import EventStream, finish
from forerun.tracking.timeline import QUEUE
from forerun.training.rollout import RolloutBatch, generate
from forerun.training.timing import StageClock
from forerun.types import Rollout

if TYPE_CHECKING:
    from forerun.training.state import Run

PROBE = 16  # rollouts on which engine and learner are compared in a step
RECENT = 256  # of the engine's newest rollouts that are looked through for them
StopRequested = Callable[[], bool]
Generate = Callable[[int, StopRequested, Callable[[], None]], RolloutBatch]  # step, stop_requested, between two rounds
OnWaiting = Callable[[int, int], None]  # step that was generated or taken, steps that now wait


class RolloutThread:
    """The thread that generates, and the steps that it has finished."""

    def __init__(
        self,
        engine: RolloutEngine,
        generate: Generate,
        steps: range,
        lag: int,
        in_flight: bool,
        on_waiting: OnWaiting = lambda step, waiting: None,
        in_use: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Nothing is generated before the first `offer`.

        Args:
            in_use: entered around every use of the engine, which others may use otherwise: a lock.
            generate: a step's rollouts by `engine`; calls its last argument between rounds.
            steps: that will be asked for, in this order.
            lag: at least 1.
            on_waiting: called whenever the number of waiting steps changes.
        """
        self._engine = engine
        self._generate = generate
        self._steps = steps
        self._lag = lag
        self._in_flight = in_flight
        self._on_waiting = on_waiting
        self._in_use = in_use or nullcontext()
        self._changed = threading.Condition()
        self._newest: Weights | None = None
        self._held = -1  # version of the engine
        self._done: dict[int, RolloutBatch] = {}
        self._failed: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def offer(self, weights: Weights) -> None:
        """Offer a newer version. Its tensors must not change any more."""
        with self._changed:
            self._newest = weights
            self._changed.notify_all()

    def take(self, step: int, stop_requested: StopRequested) -> RolloutBatch:
        """Wait for a step's rollouts.

        Raises:
            Interrupted: `stop_requested` while waiting. What `generate` raised: they could not be generated.
        """
        with self._changed:
            while step not in self._done:
                if self._failed is not None:
                    raise self._failed
                if stop_requested():
                    raise Interrupted
                self._changed.wait(0.1)
            taken = self._done.pop(step)
            self._on_waiting(step, len(self._done))
            return taken

    @property
    def waiting(self) -> int:
        """Steps that are generated and not taken."""
        return len(self._done)

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop at the next rollout; what is not taken is lost."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            for step in self._steps:
                self._wait_for(step - self._lag)
                with self._in_use:
                    self._load()
                    batch = self._generate(step, lambda: self._stopping, self._between)
                with self._changed:
                    self._done[step] = batch
                    self._on_waiting(step, len(self._done))
                    self._changed.notify_all()
        except Interrupted:
            return  # by `close`
        except BaseException as error:  # raised again by `take`
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _wait_for(self, oldest: int) -> None:
        """Wait for a version that is at least `oldest`. Raises Interrupted."""
        with self._changed:
            while self._newest is None or self._newest.version < oldest:
                if self._stopping:
                    raise Interrupted
                self._changed.wait(0.1)

    def _load(self) -> None:
        """Load the newest version."""
        with self._changed:
            newest = self._newest
        assert newest is not None
        if newest.version > self._held:
            self._engine.load(newest)
            self._held = newest.version

    def _between(self) -> None:
        if self._in_flight:
            self._load()


class AsynchronousSource:
    """The source of an asynchronous run: a `RolloutThread` from its first step on."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._thread: RolloutThread | None = None
        self._recent: deque[Rollout] = deque(maxlen=RECENT)

    def start(self, step: int) -> None:
        """Begin to generate, by the weights of now."""
        run, loop = self.run, self.run.recipe.loop
        steps = range(step, run.recipe.train.steps)
        self._thread = RolloutThread(
            run.engine, self._generate, steps, loop.lag, loop.in_flight, self._count, run.engine_lock
        )
        self._thread.offer(run.frozen_weights(step))

    def next(self, step: int, clock: StageClock) -> EventStream[RolloutBatch]:
        """A step's rollouts; stage generation is the time waited for them (exposed generation)."""
        return (yield from clock.time_call("generation", lambda: self._running.take(step, self.run.stop_requested)))

    def probe(self, version: int) -> list[Rollout]:
        """At most `PROBE` rollouts that the engine has finished by these weights, where it has any."""
        return [r for r in self._recent.copy() if all(v == version for v in r.versions)][:PROBE]

    def publish(self, version: int, clock: StageClock) -> EventStream[None]:
        """New weights exist: the thread may take them at once."""
        yield from clock.time_call("prepare", lambda: self._running.offer(self.run.frozen_weights(version)))

    def metrics(self, step: int, batch: RolloutBatch, clock: StageClock) -> dict[str, float]:
        """How old the tokens are, and who waited for whom."""
        total_s = sum(clock.seconds.values())
        return lag_metrics(batch, step) | {
            "async/steps_waiting": float(self._running.waiting),
            "async/trainer_idle": clock.seconds["generation"] / total_s,
            "async/engine_idle": clock.engine_idle_s / total_s,
        }

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _generate(self, step: int, stop_requested: StopRequested, between: Callable[[], None]) -> RolloutBatch:
        run = self.run
        run.engine_states.begin("generate", step + 1)
        n = run.recipe.train.samples_per_prompt
        work = generate(
            run.engine, run.policy, run.rewards, run.request(step), n, stop_requested, between, self._recent.append
        )
        batch = finish(work)
        run.engine_states.end(batch.timeline)
        return batch

    def _count(self, step: int, waiting: int) -> None:
        self.run.timeline.count(QUEUE, waiting, step + 1)

    @property
    def _running(self) -> RolloutThread:
        assert self._thread is not None, "start comes first"
        return self._thread


def lag_metrics(batch: RolloutBatch, step: int) -> dict[str, float]:
    """How many versions before step's own (its number, 0-based) the tokens were sampled, and how many tokens each."""
    lags = [step - version for rollout in batch.rollouts for version in rollout.versions]
    mixed = sum(len(set(rollout.versions)) > 1 for rollout in batch.rollouts)
    return {
        "async/lag_mean": sum(lags) / len(lags),
        "async/lag_max": float(max(lags)),
        "async/mixed_rollouts": mixed / len(batch.rollouts),
    } | {f"async/lag_tokens_{lag}": float(count) for lag, count in sorted(Counter(lags).items())}
