"""Any dataset of reasoning-gym by name, generated from a seed and scored by its own checker.

The checker is asked about every reading of the completion (`candidates`), and one that it pays in full is enough.
Partial credit is cut to 0: reasoning-gym pays a share for an answer that merely contains the right one.
Worked solutions, for the cold start, exist for `chain_sum` (written here) and `gsm_symbolic` (its own).
"""

from __future__ import annotations

import re
from typing import Any

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks.base import Problem, Split, Task
from forerun.tasks.extract import MARKER, boxed, final_answer, last_line, spoken, stated
from forerun.tasks.numbers import tidy
from forerun.tasks.reward import judged

ANSWER_FORMAT = f"\n\nWrite the answer at the end, after {MARKER}"
EVAL_SIZE = 512
SEED_STRIDE = 1_000_000  # entry i of a dataset is drawn from seed + i: keep the ranges of two seeds apart

_LAST_BOX = re.compile(r"\\boxed\{((?:(?!\\boxed\{).)*)\}", re.S)  # up to the last brace: answers may hold single ones
_FENCED = re.compile(r"```\w*\n(.*?)\n?```", re.S)


def build(config: TaskConfig, seed: int) -> Task:
    """A reasoning-gym dataset; evaluation problems are the same for every seed."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("The reasoning_gym task needs an extra: pip install --editable '.[tasks]'") from None

    if own := [name for name in ("seed", "size") if name in config.options]:
        raise UserError(f"'task.options' sets '{own[0]}'; set '{'task.' if own[0] == 'size' else ''}{own[0]}' instead")

    def dataset(size: int, first_seed: int) -> Any:
        try:
            return reasoning_gym.create_dataset(config.dataset, seed=first_seed, size=size, **config.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"reasoning-gym cannot make '{config.dataset}' with {config.options}: {error}") from None

    checker = dataset(1, 0)

    def problems(split: Split) -> list[Problem]:
        size, first_seed = (EVAL_SIZE, 0) if split == "eval" else (config.size or 0, SEED_STRIDE * (seed + 1))
        return [_problem(entry, config.dataset, split) for entry in dataset(size, first_seed)]

    def reward(problem: Problem, completion: str) -> float:
        if "metadata" not in problem.meta:  # no problem of the dataset, which its checker could judge
            return judged(problem.answer, completion)
        return float(_paid(checker, candidates(completion), problem.meta))

    return Task(config.dataset, problems, reward, answer_format=ANSWER_FORMAT)


def candidates(completion: str) -> list[str]:
    """What may be the answer: the last box, the whole text after the marker or its first line, or all that was said."""
    text = spoken(completion)
    if text is None:
        return []
    tail = text.rsplit(MARKER, 1)[1] if MARKER in text else text
    boxes = [*boxed(text)[0][-1:], *_LAST_BOX.findall(text)]
    found = [*boxes, tail, tail.strip(), *(stated(completion) or []), final_answer(completion)]
    found += _FENCED.findall(tail)[-1:] + ([] if MARKER in text or boxes else last_line(completion))
    found += [tidy(answer) for answer in found if "\n" not in answer.strip()]
    return [answer for answer in dict.fromkeys(found) if answer.strip()]


def _paid(checker: Any, answers: list[str], entry: dict[str, Any]) -> bool:
    """Whether the checker pays one of them in full. Raises what it raised of one, when it pays none."""
    failure: Exception | None = None
    for answer in answers:
        try:
            if checker.score_answer(answer, entry) >= 1.0:
                return True
        except Exception as error:  # checkers read answers as they should be, and fail at others
            failure = failure or error
    if failure is not None:
        raise failure
    return False


def _problem(entry: dict[str, Any], dataset: str, split: str) -> Problem:
    name = f"{dataset}/{split}/{entry['metadata'].get('source_index', 0)}"
    return Problem(name, entry["question"], str(entry["answer"]), _solution(dataset, entry["metadata"]), entry)


def _solution(dataset: str, metadata: dict[str, Any]) -> str | None:
    if dataset == "chain_sum":
        return chain_sum_solution(metadata["expression"])
    return metadata.get("answer_cot")


def chain_sum_solution(expression: str) -> str:
    """'12 + 37 - 5' -> one partial sum per line, tens before units, then the answer after '####'."""
    first, *terms = re.findall(r"(?:^-?|[+-] )\s*\d+", expression)
    total, lines = int(first), []
    for term in terms:
        sign, number = term.split()
        lines.append(_partial_sum(total, sign, int(number)))
        total = _apply(total, sign, int(number))
    return "\n".join([*lines, f"#### {total}"])


def _partial_sum(total: int, sign: str, number: int) -> str:
    """'12 + 37' -> '12 + 37 = 12 + 30 + 7 = 42 + 7 = 49'; a round or one-digit number needs no splitting."""
    tens, units = number // 10 * 10, number % 10
    result = _apply(total, sign, number)
    if tens == 0 or units == 0:
        return f"{total} {sign} {number} = {result}"
    half = _apply(total, sign, tens)
    return f"{total} {sign} {number} = {total} {sign} {tens} {sign} {units} = {half} {sign} {units} = {result}"


def _apply(total: int, sign: str, number: int) -> int:
    return total + number if sign == "+" else total - number
