"""Any dataset of reasoning-gym by name, generated from a seed and scored by its own checker.

Partial credit is cut to 0: reasoning-gym pays a share for an answer that merely contains the right one.
Worked solutions, for the cold start, exist for `chain_sum` (written here) and `gsm_symbolic` (its own).
"""

from __future__ import annotations

import re
from typing import Any

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks.base import Problem, Split, Task
from forerun.tasks.reward import final_answer

EVAL_SIZE = 512
SEED_STRIDE = 1_000_000  # entry i of a dataset is drawn from seed + i: keep the ranges of two seeds apart


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
        return float(checker.score_answer(final_answer(completion), problem.meta) >= 1.0)

    return Task(config.dataset, problems, reward)


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
