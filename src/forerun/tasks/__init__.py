"""Prompts and rewards. A task is two functions: the problems of a split, and the reward of a completion.

A new task is one file with `build(config, seed) -> Task` and one line in `TASKS`. From outside the package it is an
entry point of the group `forerun.tasks`, or `task.name=package.module:build`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.registry import Registry, load_path
from forerun.tasks.base import Completion, Problem, Reward, Split, Task, WeightedReward
from forerun.tasks.scoring import check_signature
from forerun.tasks.splits import Splits, make_splits

__all__ = ["TASKS", "Completion", "Problem", "Task", "load_task", "with_splits"]

OWN = "task"  # the task's own reward, among several

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
        task = replace(task, reward=_import_reward("task.reward", config.reward))
    rewards = _several(config, task) if config.rewards else [WeightedReward(_name(task.reward), task.reward)]
    suffix = task.answer_format if config.suffix is None else config.suffix
    return with_splits(replace(task, rewards=rewards), cache(partial(_splits, task.problems, suffix, config.size)))


def with_splits(task: Task, splits: Callable[[], Splits]) -> Task:
    """The same task with other problems."""
    return replace(task, problems=lambda split: splits().problems(split), splits=splits)


def _splits(problems: Callable[[Split], list[Problem]], suffix: str, size: int | None) -> Splits:
    return make_splits(lambda split: [p.with_suffix(suffix) for p in problems(split)], size)


def has_own_reward(config: TaskConfig) -> bool:
    """Whether a reward of the recipe is the user's: its failures may be a mistake, not only a strange answer's."""
    return config.reward is not None or bool(set(config.rewards) - {OWN}) or config.name not in TASKS.entries


def _several(config: TaskConfig, task: Task) -> list[WeightedReward]:
    paths = list(config.rewards)
    functions = [task.reward if path == OWN else _import_reward("task.rewards", path) for path in paths]
    names = [OWN if path == OWN else _name(function) for path, function in zip(paths, functions, strict=True)]
    if len(set(names)) < len(names):  # of the same name in different modules
        names = [path.replace(":", ".").replace("/", ".") for path in paths]
    return [WeightedReward(n, f, config.rewards[p]) for n, f, p in zip(names, functions, paths, strict=True)]


def _import_reward(key: str, path: str) -> Reward:
    try:
        function: Reward = load_path(path)
    except (ImportError, AttributeError) as error:
        raise UserError(f"'{key}': cannot import '{path}': {error}") from None
    check_signature(function, path)
    return function


def _name(function: Reward) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
