"""Rollouts with rewards, and the synchronous source of them: a step's own weights generate its rollouts.

The asynchronous source is in `prefetch.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from forerun.engine import Counters, RolloutEngine
from forerun.engine.base import nothing
from forerun.errors import Interrupted
from forerun.events import EventStream, Progress
from forerun.models import Policy
from forerun.tasks import Task
from forerun.training.prompts import Request
from forerun.training.timing import StageClock
from forerun.types import Rollout

if TYPE_CHECKING:
    from forerun.training.state import Run


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """n rollouts of each of P prompts, in order, with their texts and rewards."""

    rollouts: list[Rollout]
    texts: list[str]
    rewards: torch.Tensor  # [P, n]
    engine_s: float  # the engine alone
    reward_s: float
    counters: Counters  # of this call
    timeline: list[tuple[float, int]]  # (seconds, live sequences) per round
    request: Request

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(len(r.tokens) for r in self.rollouts)


def generate(
    engine: RolloutEngine,
    policy: Policy,
    task: Task,
    request: Request,
    n: int,
    stop_requested: Callable[[], bool] = lambda: False,
    between: Callable[[], None] = nothing,
    arrived: Callable[[Rollout], object] = lambda rollout: None,
) -> EventStream[RolloutBatch]:
    """Sample every prompt n times and score the texts; yields progress.

    Args:
        between: called between two rounds, see `RolloutEngine.stream`.
        arrived: called with every rollout.

    Raises:
        Interrupted: `stop_requested` between two rollouts.
    """
    rollouts: list[Rollout] = []
    before = engine.counters.copy()
    started = time.perf_counter()
    for rollout in engine.stream(request.prompts, request.sampling, n, between=between):
        rollouts.append(rollout)
        arrived(rollout)
        if stop_requested():
            raise Interrupted
        rate = len(rollouts) / (time.perf_counter() - started)
        yield Progress(len(rollouts), len(request.prompts) * n, "rollouts", rate)
    generated = time.perf_counter()
    rollouts.sort(key=lambda r: (r.prompt_index, r.sample_index))
    texts = [policy.tokenizer.decode(r.tokens, skip_special_tokens=True) for r in rollouts]
    answers = zip(rollouts, texts, strict=True)
    rewards = torch.tensor([task.reward(request.problems[r.prompt_index], text) for r, text in answers])
    return RolloutBatch(
        rollouts=rollouts,
        texts=texts,
        rewards=rewards.view(len(request.prompts), n),
        engine_s=generated - started,
        reward_s=time.perf_counter() - generated,
        counters=engine.counters.minus(before),
        timeline=list(engine.timeline),
        request=request,
    )


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
        work = generate(run.engine, run.policy, run.task, request, n, run.stop_requested)
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
