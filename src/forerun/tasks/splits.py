"""The two splits of a task, cleaned: no question twice, none in both, and everything that is left out counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from forerun.errors import UserError
from forerun.tasks.base import Problem, Split

HELD_OUT_EVERY = 10
REASONS = {
    "duplicate": "repeat another question",
    "in_both": "of training are held out too",
    "too_long": "fill the model's context",
    "size": "are beyond task.size",
}


@dataclass(frozen=True, slots=True)
class Splits:
    """Problems of both splits, and what is left out: reason -> count."""

    train: list[Problem]
    held_out: list[Problem]
    dropped: dict[str, int] = field(default_factory=dict)
    conflicts: int = 0  # repeated questions with another answer

    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split. Raises UserError when there are none."""
        found = self.train if split == "train" else self.held_out
        if not found:
            which, advice = (
                ("training", "give more different questions, or others to hold out")
                if split == "train"
                else ("held-out", f"{len(self.train)} are for training; set task.eval_path, or eval.prompts=0")
            )
            counts = [f"{count} {REASONS.get(reason, reason)}" for reason, count in self.dropped.items()]
            raise UserError(f"No {which} problem is left{': ' if counts else ''}{', '.join(counts)}; {advice}")
        return found

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
    dropped = {reason: count for reason, count in dropped.items() if count}
    return Splits(train, held_out, dropped, conflicts + more_conflicts)


def distinct(problems: Iterable[Problem]) -> tuple[list[Problem], int]:
    """The first problem of every question, and how many of the others have another answer."""
    first: dict[object, Problem] = {}
    conflicts = 0
    for problem in problems:
        conflicts += first.setdefault(key(problem), problem).answer != problem.answer
    return list(first.values()), conflicts


def hold_out(problems: list[Problem], split: Split) -> list[Problem]:
    """Every tenth different question for evaluation, none of fewer than ten; repeated ones go with their first."""
    number: dict[object, int] = {}
    for problem in problems:
        number.setdefault(key(problem), len(number))
    last = HELD_OUT_EVERY - 1
    return [p for p in problems if (number[key(p)] % HELD_OUT_EVERY == last) == (split == "eval")]


def key(problem: Problem) -> object:
    """What makes two questions the same."""
    messages = problem.messages or [{"role": "user", "content": problem.question}]
    return tuple((message["role"], message["content"].strip()) for message in messages)
