"""Prompts and rewards. A task is two functions: the problems of a split, and the reward of a completion.

A new task is one file with `build(config, seed) -> Task` and one line in `TASKS`. From outside the package it is an
entry point of the group `forerun.tasks`, or `task.name=package.module:build`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.registry import Registry
from forerun.tasks.base import Problem, Reward, Split, Task, checked
from forerun.tasks.splits import Splits, make_splits

__all__ = ["TASKS", "Problem", "Task", "load_task", "with_splits"]

TASKS = Registry(
    "task",
    {
        "gsm8k": "forerun.tasks.gsm8k:build",
        "jsonl": "forerun.tasks.jsonl:build",
        "reasoning_gym": "forerun.tasks.reasoning_gym:build",
    },
)
ALL_ROWS = ("gsm8k", "jsonl")  # tasks that have a number of problems of their own
GENERATED = 2000  # problems of the others where `task.size` is null


def load_task(config: TaskConfig, seed: int = 0) -> Task:
    """Build the task of a recipe; its problems are read when they are first asked for, and once.

    Raises:
        UserError: unknown task name, missing or empty data, or a reward function that cannot be imported.
    """
    try:
        build = TASKS.load(config.name)
    except UserError as error:
        raise UserError(f"'task.name': {error}") from None
    generates = config.size is None and config.name not in ALL_ROWS
    task: Task = build(config.model_copy(update={"size": GENERATED}) if generates else config, seed)
    if config.reward is not None:
        task = replace(task, reward=_import_reward(config.reward))
    return with_splits(replace(task, reward=checked(task.reward)), cache(partial(_splits, task.problems, config)))


def with_splits(task: Task, splits: Callable[[], Splits]) -> Task:
    """The same task with other problems."""
    return replace(task, problems=lambda split: splits().problems(split), splits=splits)


def _splits(problems: Callable[[Split], list[Problem]], config: TaskConfig) -> Splits:
    return make_splits(lambda split: [p.with_suffix(config.suffix) for p in problems(split)], config.size)


def _import_reward(path: str) -> Reward:
    module_name, _, function_name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"'task.reward': cannot import '{path}' (package.module:function): {error}") from None
    if not callable(function):
        raise UserError(f"'task.reward': '{path}' is not a function")
    return function
