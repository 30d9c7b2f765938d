"""Prompts and rewards. A task is two functions: the problems of a split, and the reward of a completion.

A new task is one file with `build(config, seed) -> Task` and one line in `TASKS`. From outside the package it is an
entry point of the group `forerun.tasks`, or `task.name=package.module:build`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.registry import Registry
from forerun.tasks.base import Problem, Reward, Split, Task, checked

__all__ = ["TASKS", "Problem", "Task", "load_task"]

TASKS = Registry(
    "task",
    {
        "gsm8k": "forerun.tasks.gsm8k:build",
        "jsonl": "forerun.tasks.jsonl:build",
        "reasoning_gym": "forerun.tasks.reasoning_gym:build",
    },
)


def load_task(config: TaskConfig, seed: int = 0) -> Task:
    """Build the task of a recipe.

    Raises:
        UserError: unknown task name, missing or empty data, or a reward function that cannot be imported.
    """
    try:
        build = TASKS.load(config.name)
    except UserError as error:
        raise UserError(f"'task.name': {error}") from None
    task: Task = build(config, seed)
    if config.reward is not None:
        task = replace(task, reward=_import_reward(config.reward))
    return replace(task, reward=checked(task.reward), problems=_with_suffix(task.problems, config.suffix))


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
