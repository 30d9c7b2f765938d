"""Prompts and rewards. A task is two functions: problems of a split, and the reward of a completion.

`load_task` is the way in; a new task is one file with a builder and one line in `BUILDERS`.
"""

from __future__ import annotations

from forerun.tasks.base import Problem, Task, load_task

__all__ = ["Problem", "Task", "load_task"]
