"""The two splits of a task, cleaned: no question twice, none in both, and everything that is left out counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from forerun.errors import UserError
from forerun.tasks.base import Problem, Split

HELD_OUT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Splits:
    """Problems of both splits, and what is left out: reason -> count."""

    train: list[Problem]
    held_out: list[Problem]
    dropped: dict[str, int] = field(default_factory=dict)
    conflicts: int = 0  # repeated questions with another answer

    def warnings(self) -> list[str]:
        """What the user should know about what is left out, a sentence each."""
        total = len(self.train) + len(self.held_out) + sum(self.dropped.values())
        sentences = []
        if count := self.dropped.get("duplicate"):
            other = f", {self.conflicts} of them with another answer than the first" if self.conflicts else ""
            sentences.append(f"{count} of {total} problems repeat a question and are left out{other}")
        if count := self.dropped.get("in_both"):
            sentences.append(
                f"{count} training problems are held-out ones too and are left out of training, "
                f"{len(self.train)} are left"
            )
        return sentences


def make_splits(problems: Callable[[Split], list[Problem]], size: int | None) -> Splits:
    """Both splits of a task.

    Args:
        size: training problems, at most; None: all.

    Raises UserError when a split is empty.
    """
    raw, raw_held_out = problems("train"), problems("eval")
    held_out, more_conflicts = distinct(raw_held_out)
    different, conflicts = distinct(raw)
    taken = {key(problem) for problem in held_out}
    apart = [problem for problem in different if key(problem) not in taken]
    train = apart[:size]
    dropped = {
        "duplicate": len(raw) - len(different) + len(raw_held_out) - len(held_out),
        "in_both": len(different) - len(apart),
        "size": len(apart) - len(train),
    }
    if not train or not held_out:
        raise UserError(
            f"No {'training' if not train else 'held-out'} problem is left: of {len(raw)} for training "
            f"{len(raw) - len(different)} repeat another question and {dropped['in_both']} are among the "
            f"{len(held_out)} held-out ones; give more different questions, or other held-out ones"
        )
    return Splits(train, held_out, {reason: n for reason, n in dropped.items() if n}, conflicts + more_conflicts)


def distinct(problems: Iterable[Problem]) -> tuple[list[Problem], int]:
    """The first problem of every question, and how many of the others have another answer."""
    first: dict[object, Problem] = {}
    conflicts = 0
    for problem in problems:
        conflicts += first.setdefault(key(problem), problem).answer != problem.answer
    return list(first.values()), conflicts


def hold_out(problems: list[Problem], split: Split) -> list[Problem]:
    """Every tenth different question for evaluation, the others for training; repeated ones go with their first."""
    number: dict[object, int] = {}
    for problem in problems:
        number.setdefault(key(problem), len(number))
    last = HELD_OUT_EVERY - 1
    chosen = [p for p in problems if (number[key(p)] % HELD_OUT_EVERY == last) == (split == "eval")]
    if not chosen:
        raise UserError(
            f"Too few different questions to hold one tenth out for evaluation: {len(number)}; set task.eval_path"
        )
    return chosen


def key(problem: Problem) -> object:
    """What makes two questions the same."""
    messages = problem.messages or [{"role": "user", "content": problem.question}]
    return tuple((message["role"], message["content"].strip()) for message in messages)
