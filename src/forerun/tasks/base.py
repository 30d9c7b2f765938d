"""What a task is.

Tokens and chat templates are in `models/`, advantages in `algorithms/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from forerun.chat import Messages, Prompt
from forerun.errors import UserError

if TYPE_CHECKING:
    from forerun.tasks.splits import Splits

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with a checkable answer.

    `solution` is a worked one for the cold start, where the task has it. `messages` is the whole prompt, which ends
    with the question, where that is more than one message of the user's.
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    messages: Messages | None = None

    @property
    def prompt(self) -> Prompt:
        """What the model is asked."""
        return self.question if self.messages is None else self.messages

    def with_suffix(self, suffix: str) -> Problem:
        """The same problem with a text added to its question."""
        question = f"{self.question}{suffix}"
        if self.messages is None:
            return replace(self, question=question)
        return replace(self, question=question, messages=[*self.messages[:-1], {"role": "user", "content": question}])


Reward = Callable[[Problem, str], float]


@dataclass(frozen=True, slots=True)
class Task:
    """`problems("train")` and `problems("eval")` never share a question; `reward(problem, completion)` is finite.

    `splits` is set by `load_task`: both splits, and what is left out of them.
    """

    name: str
    problems: Callable[[Split], list[Problem]]
    reward: Reward
    splits: Callable[[], Splits] | None = None


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
