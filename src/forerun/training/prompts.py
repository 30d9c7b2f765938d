"""What a run samples from: the policy after its cold start, and the prompts of every step."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from forerun.config import Recipe
from forerun.engine import Sampling
from forerun.engine.local.scheduler import request_seed
from forerun.errors import UserError
from forerun.events import EventStream, Note, Progress, as_stage
from forerun.learner.lora import find_targets
from forerun.models import Policy, load_policy
from forerun.tasks import Problem, Task
from forerun.training.data import encode_problem, recipe_encoder


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is asked for: problems, their prompts as token ids, and how to sample."""

    problems: list[Problem]
    prompts: list[list[int]]
    sampling: Sampling


def prepare_policy(recipe: Recipe, task: Task, folder: Path) -> EventStream[Policy]:
    """Load the policy; run its cold start where the recipe has one, keeping the adapter in `folder/cold_start`."""
    policy = yield from open_policy(recipe)
    yield from warm_up(policy, recipe, task, folder)
    return policy


def open_policy(recipe: Recipe) -> EventStream[Policy]:
    """The policy as the recipe names it, before its cold start."""
    policy = yield from as_stage("loading the policy", _load(recipe))
    if recipe.train.lora is not None:
        find_targets(policy.model, recipe.train.lora.targets)  # a wrong name fails before anything is trained
    return policy


def warm_up(policy: Policy, recipe: Recipe, task: Task, folder: Path) -> EventStream[None]:
    """The policy's cold start, where the recipe has one; its adapter is kept in `folder/cold_start`."""
    if recipe.cold_start is not None:
        yield from as_stage("cold start", _cold_start(policy, recipe, task, folder / "cold_start"))


def _load(recipe: Recipe) -> EventStream[Policy]:
    settings = recipe.policy
    yield from ()
    return load_policy(settings.model, settings.dtype, settings.device, settings.adapter)


def _cold_start(policy: Policy, recipe: Recipe, task: Task, folder: Path) -> EventStream[None]:
    from forerun.learner.sft import merge, solved_examples, train_adapter

    assert recipe.cold_start is not None
    steps = recipe.cold_start.steps
    problems = task.problems("train")
    share = recipe.cold_start.answer_only
    encoder = recipe_encoder(recipe, policy.tokenizer, policy.name)
    solved = solved_examples(policy, problems, lambda problem: encode_problem(problem, encoder), share)
    examples = [pair for pair in solved if len(pair[0]) + len(pair[1]) <= policy.context]
    if not examples:
        raise UserError(f"All {len(solved)} worked solutions are longer than the model's {policy.context} positions")
    losses: list[float] = []
    started = time.perf_counter()
    work = train_adapter(policy, examples, recipe.cold_start, recipe.seed)
    while True:
        try:
            losses.append(next(work))
        except StopIteration as end:
            merge(policy, end.value, folder)
            break
        yield Progress(len(losses), steps, "steps", len(losses) / (time.perf_counter() - started))
    yield Note(
        f"cold start: {steps} steps on {len(examples)} worked solutions, loss {losses[0]:.3f} -> {losses[-1]:.3f} "
        f"nats per token, {time.perf_counter() - started:.0f} s; adapter in {folder}"
        + (
            f"; {cut} solutions beyond {policy.context} positions left out"
            if (cut := len(solved) - len(examples))
            else ""
        )
    )


def request_of_step(recipe: Recipe, policy: Policy, problems: list[Problem], step: int) -> Request:
    """The problems of a step (0-based) as an engine takes them."""
    chosen = problems_of_step(problems, step, recipe.train.prompts_per_step, recipe.seed)
    return Request(chosen, [encode(problem, recipe, policy) for problem in chosen], sampling_for(recipe, step, 0))


def sampling_for(recipe: Recipe, stream: int, number: int, temperature: float | None = None) -> Sampling:
    """How the recipe samples; every (stream, number) has random numbers of its own."""
    rollout = recipe.rollout
    chosen = rollout.temperature if temperature is None else temperature
    seed = request_seed(recipe.seed, stream, number)
    return Sampling(rollout.max_new_tokens, chosen, seed, tuple(rollout.stop))


def encode(problem: Problem, recipe: Recipe, policy: Policy) -> list[int]:
    """A problem's token ids, through the chat template where the recipe wants it.

    Raises:
        UserError: the model has no chat template, or the prompt leaves no room in its context.
    """
    ids = encode_problem(problem, recipe_encoder(recipe, policy.tokenizer, policy.name))
    if len(ids) >= policy.context:
        raise UserError(
            f"The prompt of problem '{problem.id}' has {len(ids)} tokens and the model's context is {policy.context}; "
            "shorten it or take it out of the data"
        )
    return ids


def problems_of_step(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """`count` problems of a step (0-based): every epoch is its own shuffle, and a step depends on its number alone."""
    chosen = []
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, len(problems))
        chosen.append(problems[_order(len(problems), epoch, seed)[index]])
    return chosen


@lru_cache(maxsize=2)  # a step reaches into two epochs at most, unless the problems are few
def _order(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)
