"""What a task is.

Tokens and chat templates are in `models/`, advantages in `algorithms/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

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


def checked(reward: Reward) -> Reward:
    """The same reward; its failures become errors that name the function and the problem."""
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
