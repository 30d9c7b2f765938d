"""What a task is, and what its reward sees.

Tokens and chat templates are in `models/`, advantages in `algorithms/`. Rewards are called in processes of their own
(`workers.py`), where `scoring.py` turns what they return, or how they fail, into a `Score`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from forerun.chat import Messages, Prompt

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


@dataclass(frozen=True, slots=True)
class Completion:
    """A rollout as a reward sees it."""

    problem: Problem
    text: str  # without special tokens: what a reward of (problem, completion) gets
    text_with_special_tokens: str
    finish_reason: str = "eos"  # see `types.Rollout`
    tokens: Sequence[int] = ()  # ids; none where a text was given without them
    token_count: int | None = None  # None where it is not known: `forerun score` on lines that do not say


Reward = Callable[[Problem, Any], float | Mapping[str, float]]  # the second is the text, or a `Completion`


class NotScored(Exception):
    """Raised by a reward function that gives no number: the end of a sentence that says why. It counts 0."""


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """One of the reward functions whose weighted sum is the reward."""

    name: str
    function: Reward
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """`problems("train")` and `problems("eval")` never share a question.

    `splits` and `rewards` are set by `load_task`: both splits, and what is left out of them; the reward functions that
    the recipe asks for, the task's own unless it names others.
    """

    name: str
    problems: Callable[[Split], list[Problem]]
    reward: Reward
    splits: Callable[[], Splits] | None = None
    answer_format: str = ""  # added to every question unless the recipe says otherwise
    rewards: Sequence[WeightedReward] = ()
