"""What several benchmarks share: policy, task and prompts of a recipe, GRPO steps, means with errors, the JSON file.

The steps are made of the loop's own pieces, without its console, run folder, checkpoints and checksums.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forerun.algorithms.advantages import group_advantages
from forerun.config import Recipe, load_recipe
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import request_seed
from forerun.events import finish
from forerun.learner.learner import Learner
from forerun.learner.objective import Scored
from forerun.models import Policy, load_policy
from forerun.models.logprobs import TokenBatch, completion_logits
from forerun.tasks import Problem, Task, load_task
from forerun.tasks.workers import RewardWorkers
from forerun.tracking.environment import describe_environment
from forerun.training.prompts import Request, encode, problems_of_step
from forerun.training.rollout import RolloutBatch, generate
from forerun.types import Rollout

Forward = Callable[[Any, TokenBatch], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Setting:
    """A recipe with what it names."""

    recipe: Recipe
    policy: Policy
    task: Task

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Token ids of the problems."""
        return [encode(p, self.recipe, self.policy) for p in problems]

    def held_out(self, count: int) -> list[list[int]]:
        """Token ids of the first `count` prompts that training never sees."""
        return self.prompts(self.task.problems("eval")[:count])

    def sampling(self, seed: int, temperature: float | None = None) -> Sampling:
        """The recipe's limits, at its temperature unless another one is given."""
        rollout = self.recipe.rollout
        chosen = rollout.temperature if temperature is None else temperature
        return Sampling(rollout.max_new_tokens, chosen, seed, tuple(rollout.stop))


def load_setting(name: str, overrides: dict[str, Any] | None = None) -> Setting:
    """Load a recipe, its policy and its task.

    Args:
        overrides: dotted keys of the recipe; entries that are None leave the recipe's own value.
    """
    recipe = load_recipe(name, {k: v for k, v in (overrides or {}).items() if v is not None})
    torch.manual_seed(recipe.seed)
    settings = recipe.policy
    policy = load_policy(settings.model, settings.dtype, settings.device, settings.adapter)
    return Setting(recipe, policy, load_task(recipe.task, recipe.seed))


def options(doc: str | None) -> argparse.ArgumentParser:
    """A command line with what every benchmark of a recipe takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--max-new-tokens", type=int, help="default: the recipe's")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


def plain_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line as the JSON file records it: of paths the names, folders are of one machine."""
    return {key: value.name if isinstance(value, Path) else value for key, value in vars(arguments).items()}


class Trajectory:
    """GRPO on the recipe's training prompts, one step at a time; who generates is the caller's choice."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.learner = Learner(setting.policy, setting.recipe.train, setting.recipe.rollout.temperature)
        self._problems = setting.task.problems("train")
        self._rewards = RewardWorkers(setting.recipe.task, setting.recipe.seed)  # they end with this process

    def problems(self, step: int) -> list[Problem]:
        """Those of a step, 0-based, as in a run of the recipe."""
        recipe = self.setting.recipe
        return problems_of_step(self._problems, step, recipe.train.prompts_per_step, recipe.seed)

    def generate(self, engine: LocalEngine, problems: Sequence[Problem], step: int) -> RolloutBatch:
        """The step's rollouts by `engine`, with rewards."""
        setting, recipe = self.setting, self.setting.recipe
        sampling = setting.sampling(request_seed(recipe.seed, step, 0))
        request = Request(list(problems), setting.prompts(problems), sampling)
        return finish(generate(engine, setting.policy, self._rewards, request, recipe.train.samples_per_prompt))

    def update(self, generated: RolloutBatch, forward: Forward = completion_logits) -> Scored:
        """Log-probabilities (through `forward`) and one update of the policy."""
        train = self.setting.recipe.train
        scored = finish(self.learner.score(generated.rollouts, forward=forward))
        advantages = group_advantages(generated.rewards, train.normalize_std).view(-1)
        finish(self.learner.update(generated.rollouts, advantages, scored, train.learning_rate))
        return scored


class Movement:
    """How far the policy's weights have gone from where they were."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._start = [p.detach().clone() for p in policy.model.parameters()]

    def relative(self) -> float:
        """Length of the difference over the length of the start."""
        pairs = zip(self._policy.model.parameters(), self._start, strict=True)
        parts = [(float((p.detach() - s).float().square().sum()), float(s.float().square().sum())) for p, s in pairs]
        return (sum(d for d, _ in parts) / sum(s for _, s in parts)) ** 0.5


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard error (0 for a single value)."""

    mean: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.stderr:.3f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of independent values."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Mean(statistics.mean(values), error)


def difference(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Mean of first minus second, pair by pair."""
    return mean_of([a - b for a, b in zip(first, second, strict=True)])


def tokens_per_round(rollouts: Sequence[Rollout]) -> list[float]:
    """Of every prompt, in order: tokens over policy forwards of all its rollouts, rounds without a draft included."""
    totals: dict[int, list[int]] = {}
    for rollout in rollouts:
        total = totals.setdefault(rollout.prompt_index, [0, 0])
        total[0] += len(rollout.tokens)
        total[1] += rollout.rounds
    return [tokens / rounds for _, (tokens, rounds) in sorted(totals.items())]


def write_result(path: Path | None, benchmark: str, recipe: Recipe, result: dict[str, Any]) -> None:
    """Write the result with recipe, machine and versions; without a path do nothing."""
    if path is None:
        return
    head = {"benchmark": benchmark, "recipe": recipe.model_dump(mode="json")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **result, "environment": describe_environment()}, indent=2) + "\n")
