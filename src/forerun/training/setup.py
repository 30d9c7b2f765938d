"""What a run needs before its first step: the policy after its cold start, and the prompts (drafter: `drafter.py`)."""

from __future__ import annotations

import random
import time
from pathlib import Path

from forerun.config import Recipe
from forerun.errors import UserError
from forerun.learner.lora import find_targets
from forerun.models import Policy, load_policy
from forerun.report.console import Console
from forerun.tasks import Problem, Task
from forerun.types import Prompt


def prepare_policy(recipe: Recipe, task: Task, folder: Path, console: Console) -> Policy:
    """Load the policy; run its cold start where the recipe has one, keeping the adapter in `folder/cold_start`."""
    settings = recipe.policy
    with console.stage("loading the policy"):
        policy = load_policy(settings.model, settings.dtype, settings.device, settings.adapter)
    if recipe.train.lora is not None:
        find_targets(policy.model, recipe.train.lora.targets)  # a wrong name is told before anything is trained
    if recipe.cold_start is not None:
        _cold_start(policy, recipe, task, folder / "cold_start", console)
    return policy


def _cold_start(policy: Policy, recipe: Recipe, task: Task, folder: Path, console: Console) -> None:
    from forerun.learner.sft import cold_start, merge, solved_examples

    assert recipe.cold_start is not None
    steps = recipe.cold_start.steps
    problems, share = task.problems("train"), recipe.cold_start.answer_only
    examples = solved_examples(policy, problems, recipe.policy.chat, recipe.policy.system, share)
    losses: list[float] = []
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        console.progress(step + 1, steps, "steps", (step + 1) / (time.perf_counter() - started))

    with console.stage("cold start"):
        adapter = cold_start(policy, examples, recipe.cold_start, recipe.seed, report)
        merge(policy, adapter, folder)
    console.note(
        f"cold start: {steps} steps on {len(examples)} worked solutions, loss {losses[0]:.3f} -> {losses[-1]:.3f} "
        f"nats per token, {time.perf_counter() - started:.0f} s; adapter in {folder}"
    )


def encode(problem: Problem, recipe: Recipe, policy: Policy) -> Prompt:
    """A problem as the engine takes it.

    Raises:
        UserError: the model has no chat template, or the prompt leaves no room in its context.
    """
    ids = policy.encode(problem.question, recipe.policy.chat, recipe.policy.system)
    if len(ids) >= policy.context:
        raise UserError(
            f"The prompt of problem '{problem.id}' has {len(ids)} tokens and the model's context is {policy.context}; "
            "shorten it or take it out of the data"
        )
    return Prompt(ids, problem.id, problem.answer)


def prompts_of_step(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The problems of a step (0-based): every epoch is its own shuffle, and a step depends on its number alone."""
    chosen = []
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, len(problems))
        order = random.Random(f"{seed}/{epoch}").sample(range(len(problems)), len(problems))
        chosen.append(problems[order[index]])
    return chosen
