"""Generation that runs ahead of learning, by at most `lag` weight versions.

A thread generates the steps' rollouts in their order. It begins step s (0-based) as soon as version s - lag has been
published, with the newest version that there is; so every token that step s trains on is at most `lag` versions old,
and at most `lag` + 1 steps wait: nothing piles up. In flight, a version that appears meanwhile takes over between two
rounds, and each token says which one emitted it. With lag 0 the learner would wait for all of it: the loop then
generates by itself, without this.
Left out: keeping unfinished work over a restart (a resumed run generates it again, with the weights that it then has).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from forerun.engine import RolloutEngine, Weights
from forerun.errors import Interrupted
from forerun.training.rollout import Generated

Stop = Callable[[], bool]
Told = Callable[[int, int], None]  # step that was generated or taken, steps that now wait
Make = Callable[[int, Stop, Callable[[], None]], Generated]  # step, stop_requested, between two rounds


class RolloutsAhead:
    """The thread, and what it has finished."""

    def __init__(
        self, engine: RolloutEngine, make: Make, steps: range, lag: int, in_flight: bool, told: Told | None = None
    ) -> None:
        """Nothing is generated before the first `publish`.

        Args:
            make: generates a step's rollouts with `engine`, calling its last argument between rounds.
            steps: that will be asked for, in this order.
            lag: at least 1.
            told: called whenever the number of waiting steps changes.
        """
        self._told = told or (lambda step, waiting: None)
        self._engine, self._make, self._steps, self._lag, self._in_flight = engine, make, steps, lag, in_flight
        self._changed = threading.Condition()
        self._newest: Weights | None = None
        self._held = -1  # version of the engine
        self._done: dict[int, Generated] = {}
        self._failed: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def publish(self, weights: Weights) -> None:
        """A newer version. Its tensors must not change any more."""
        with self._changed:
            self._newest = weights
            self._changed.notify_all()

    def take(self, step: int, stop_requested: Stop) -> Generated:
        """Wait for a step's rollouts.

        Raises:
            Interrupted: `stop_requested` while waiting. What `make` raised: it could not generate them.
        """
        with self._changed:
            while step not in self._done:
                if self._failed is not None:
                    raise self._failed
                if stop_requested():
                    raise Interrupted
                self._changed.wait(0.1)
            taken = self._done.pop(step)
            self._told(step, len(self._done))
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
                self._load(step - self._lag)
                generated = self._make(step, lambda: self._stopping, self._between)
                with self._changed:
                    self._done[step] = generated
                    self._told(step, len(self._done))
                    self._changed.notify_all()
        except Interrupted:
            pass  # asked for by `close`
        except BaseException as error:  # told to whoever waits
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _load(self, oldest: int) -> None:
        """Hold the newest version, waiting until it is at least `oldest`. Raises Interrupted."""
        with self._changed:
            while self._newest is None or self._newest.version < oldest:
                if self._stopping:
                    raise Interrupted
                self._changed.wait(0.1)
            newest = self._newest
        if newest.version > self._held:
            self._engine.load(newest)
            self._held = newest.version

    def _between(self) -> None:
        if self._in_flight:
            self._load(self._held)


def lag_of(generated: Generated, step: int) -> dict[str, float]:
    """How many versions behind step's own (its number, 0-based) the tokens were sampled, and how many tokens each."""
    lags = [step - version for rollout in generated.rollouts for version in rollout.versions]
    mixed = sum(len(set(rollout.versions)) > 1 for rollout in generated.rollouts)
    return {
        "async/lag_mean": sum(lags) / len(lags),
        "async/lag_max": float(max(lags)),
        "async/mixed_rollouts": mixed / len(generated.rollouts),
    } | {f"async/lag_tokens_{lag}": float(count) for lag, count in sorted(Counter(lags).items())}
