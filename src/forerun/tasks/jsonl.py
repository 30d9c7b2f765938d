"""Your own problems: rows of a file, a folder or a hub data set, with a question and an answer each."""

from __future__ import annotations

from functools import partial

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks.base import Problem, Task
from forerun.tasks.columns import problem_of
from forerun.tasks.files import Row
from forerun.tasks.reward import final_answer_reward
from forerun.tasks.sources import problems_of_split


def build(config: TaskConfig, seed: int) -> Task:
    """Problems of `task.path`; held-out ones of `task.eval_path` or `task.eval_split`, or else every tenth question."""
    if config.path is None:
        raise UserError("The jsonl task needs 'task.path': a data file, a folder, or a data set owner/name of the hub")

    def make(row: Row, where: str, name: str) -> Problem:
        return problem_of(row, config.columns, where, name, needs_answer=config.uses_task_reward)

    problems = partial(problems_of_split, config, make=make)
    return Task("jsonl", problems, final_answer_reward)
