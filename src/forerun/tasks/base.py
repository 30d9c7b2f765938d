"""What a task is, and how a recipe's `task:` block becomes one.

Left out: tokens and chat templates (`models/`), group advantages (`learner/`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from forerun.config import TaskConfig
from forerun.errors import UserError

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with a checkable answer. `solution` is a worked one for the cold start, where the task has it."""

    id: str
    question: str
    answer: str
    solution: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


Reward = Callable[[Problem, str], float]


@dataclass(frozen=True, slots=True)
class Task:
    """`problems("train")` and `problems("eval")` never share a question; `reward(problem, completion)` is finite."""

    name: str
    problems: Callable[[Split], list[Problem]]
    reward: Reward


def load_task(config: TaskConfig, seed: int = 0) -> Task:
    """Build the task of a recipe.

    Raises:
        UserError: unknown task name, missing or empty data, or a reward function that cannot be imported.
    """
    from forerun.tasks import gsm8k, jsonl, reasoning_gym

    builders = {"gsm8k": gsm8k.build, "jsonl": jsonl.build, "reasoning_gym": reasoning_gym.build}
    if config.name not in builders:
        raise UserError(f"'task.name': no task is called '{config.name}'; there are {', '.join(builders)}")
    task = builders[config.name](config, seed)
    if config.reward is not None:
        task = replace(task, reward=_import_reward(config.reward))
    return replace(task, reward=checked(task.reward), problems=_with_suffix(task.problems, config.suffix))


def checked(reward: Reward) -> Reward:
    """The same reward, whose failures become sentences that name the function and the problem."""
    name = getattr(reward, "__name__", str(reward))

    def call(problem: Problem, completion: str) -> float:
        try:
            value = float(reward(problem, completion))
        except Exception as error:
            raise UserError(
                f"The reward function '{name}' raised {type(error).__name__} on problem '{problem.id}': {error}"
            ) from error
        if not math.isfinite(value):
            raise UserError(f"The reward function '{name}' returned {value} on '{problem.id}'; it must be finite")
        return value

    return call


def _import_reward(path: str) -> Reward:
    module_name, _, function_name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"'task.reward': cannot import '{path}' (package.module:function): {error}") from None
    if not callable(function):
        raise UserError(f"'task.reward': '{path}' is not a function")
    return function


def _with_suffix(problems: Callable[[Split], list[Problem]], suffix: str) -> Callable[[Split], list[Problem]]:
    if not suffix:
        return problems
    return lambda split: [replace(p, question=f"{p.question}{suffix}") for p in problems(split)]
