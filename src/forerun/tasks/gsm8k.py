"""GSM8K: grade-school word problems with worked solutions, scored on the final number."""

from __future__ import annotations

import re

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks.base import Problem, Split, Task
from forerun.tasks.files import Row
from forerun.tasks.reward import final_answer_reward
from forerun.tasks.sources import problems_of_split, read_source

HUB_NAME = "openai/gsm8k"


def build(config: TaskConfig, seed: int) -> Task:
    """GSM8K from the hub, or from a file with `question` and `answer` in GSM8K's layout (`task.path`)."""

    def problems(split: Split) -> list[Problem]:
        if config.path is not None:
            return problems_of_split(config, split, _problem)
        try:
            rows = read_source(HUB_NAME, "main", "train" if split == "train" else "test")
        except UserError as error:
            raise UserError(
                f"GSM8K cannot be loaded from the hub; give a file: task.path=gsm8k.jsonl ({error})"
            ) from None
        return [_problem(row, f"Row {i}", f"gsm8k/{split}/{i}") for i, row in enumerate(rows)]

    return Task("gsm8k", problems, final_answer_reward)


def _problem(row: Row, where: str, name: str) -> Problem:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise UserError(
            f"{where} is not in GSM8K's layout: 'question', and 'answer', a text that ends with '#### number' (it has "
            f"{', '.join(f'{key}: {type(value).__name__}' for key, value in row.items())}); "
            "for questions with bare answers set task.name=jsonl"
        )
    solution = re.sub(r"<<.*?>>", "", answer)
    return Problem(name, question, solution.rsplit("####", 1)[1].strip().replace(",", ""), solution)
