"""Rollouts with rewards, and the synchronous source of them: a step's own weights generate its rollouts.

The asynchronous source is in `prefetch.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from forerun.engine import Counters, RolloutEngine
from forerun.engine.base import nothing
from forerun.errors import Interrupted
from forerun.events import EventStream, Progress
from forerun.models import Policy
from forerun.tasks import Completion, Problem
from forerun.tasks.scoring import Score
from forerun.tasks.workers import RewardWorkers
from forerun.training.prompts import Request
from forerun.training.timing import StageClock
from forerun.types import Rollout

if TYPE_CHECKING:
    from forerun.training.state import Run


POLL_S = 0.1  # between two looks at a requested stop, while rewards are awaited


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """n rollouts of each of P prompts, in order, with their texts and rewards."""

    rollouts: list[Rollout]
    texts: list[str]
    rewards: torch.Tensor  # [P, n]
    engine_s: float  # the engine alone
    reward_s: float  # after it
    counters: Counters  # of this call
    timeline: list[tuple[float, int]]  # (seconds, live sequences) per round
    request: Request
    scores: list[Score] = field(default_factory=list)  # what the rewards are made of, in the order of the rollouts

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(len(r.tokens) for r in self.rollouts)


def generate(
    engine: RolloutEngine,
    policy: Policy,
    workers: RewardWorkers,
    request: Request,
    n: int,
    stop_requested: Callable[[], bool] = lambda: False,
    between: Callable[[], None] = nothing,
    arrived: Callable[[Rollout], object] = lambda rollout: None,
) -> EventStream[RolloutBatch]:
    """Sample every prompt n times; `workers` compute the rewards of what is finished meanwhile. Yields progress.

    Args:
        between: called between two rounds, see `RolloutEngine.stream`.
        arrived: called with every rollout.

    Raises:
        Interrupted: `stop_requested` between two rollouts. UserError: the recipe's own rewards fail too often.
    """
    finished: list[tuple[Rollout, Completion, Future[Score]]] = []
    before = engine.counters.copy()
    started = time.perf_counter()
    for rollout in engine.stream(request.prompts, request.sampling, n, between=between):
        arrived(rollout)
        completion = as_completion(rollout, request.problems[rollout.prompt_index], policy)
        finished.append((rollout, completion, workers.submit(completion)))
        if stop_requested():
            raise Interrupted
        rate = len(finished) / (time.perf_counter() - started)
        yield Progress(len(finished), len(request.prompts) * n, "rollouts", rate)
    generated = time.perf_counter()
    finished.sort(key=lambda item: (item[0].prompt_index, item[0].sample_index))
    rollouts, completions, futures = (list(column) for column in zip(*finished, strict=True))
    scores = yield from awaited(futures, stop_requested)
    workers.settle(completions, scores)
    return RolloutBatch(
        rollouts=rollouts,
        texts=[completion.text for completion in completions],
        rewards=torch.tensor([score.reward for score in scores]).view(len(request.prompts), n),
        scores=scores,
        engine_s=generated - started,
        reward_s=time.perf_counter() - generated,
        counters=engine.counters.minus(before),
        timeline=list(engine.timeline),
        request=request,
    )


def as_completion(rollout: Rollout, problem: Problem, policy: Policy) -> Completion:
    """What the rewards see of a rollout."""
    text, whole = (policy.tokenizer.decode(rollout.tokens, skip_special_tokens=skip) for skip in (True, False))
    return Completion(problem, text, whole, rollout.finish_reason, rollout.tokens, len(rollout.tokens))


def awaited(futures: Sequence[Future[Score]], stop_requested: Callable[[], bool]) -> EventStream[list[Score]]:
    """The rewards that are still being computed. Raises Interrupted on `stop_requested`."""
    while left := wait(futures, POLL_S).not_done:
        if stop_requested():
            for future in left:
                future.cancel()
            raise Interrupted
        yield Progress(len(futures) - len(left), len(futures), "rewards")
    return [future.result() for future in futures]


class Source(Protocol):
    """Where the loop's rollouts come from."""

    def start(self, step: int) -> None:
        """The first step (0-based) that will be asked for."""

    def next(self, step: int, clock: StageClock) -> EventStream[RolloutBatch]:
        """A step's rollouts."""

    def probe(self, version: int) -> list[Rollout]:
        """Some rollouts by the present weights, which are `version`; none where those of `next` are."""

    def publish(self, version: int, clock: StageClock) -> EventStream[None]:
        """New weights exist."""

    def metrics(self, step: int, batch: RolloutBatch, clock: StageClock) -> dict[str, float]:
        """What the source adds to a step's metrics."""

    def close(self) -> None:
        """Stop generating."""


class SynchronousSource:
    """The source of a synchronous run: a step's rollouts when the step asks for them, by that step's weights."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def start(self, step: int) -> None:
        """Nothing is generated before it is asked for."""

    def next(self, step: int, clock: StageClock) -> EventStream[RolloutBatch]:
        """A step's rollouts: stages data, prepare and generation."""
        run = self.run
        request = yield from clock.time_call("data", lambda: run.request(step))
        yield from clock.time_call("prepare", lambda: run.engine.load(run.weights(step)))
        run.engine_states.begin("generate", step + 1)
        n = run.recipe.train.samples_per_prompt
        work = generate(run.engine, run.policy, run.rewards, request, n, run.stop_requested)
        batch = yield from clock.time_stage("generation", work)
        run.engine_states.end(batch.timeline)
        return batch

    def probe(self, version: int) -> list[Rollout]:
        """None: those of `next` are by the present weights."""
        return []

    def publish(self, version: int, clock: StageClock) -> EventStream[None]:
        """New weights exist. The next step takes them when it asks for rollouts."""
        yield from ()

    def metrics(self, step: int, batch: RolloutBatch, clock: StageClock) -> dict[str, float]:
        """Nothing waits and nothing lags."""
        return {}

    def close(self) -> None:
        """Nothing is under way between two steps."""
