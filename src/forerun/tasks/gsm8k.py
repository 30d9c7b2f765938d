"""GSM8K: grade-school word problems with worked solutions, scored by math-verify on the final number."""

from __future__ import annotations

import re

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks.base import Problem, Split, Task
from forerun.tasks.jsonl import held_out, read_jsonl
from forerun.tasks.reward import math_reward

HUB_NAME = "openai/gsm8k"


def build(config: TaskConfig, seed: int) -> Task:
    """GSM8K from the hub, or from a JSONL file with `question` and `answer` in GSM8K's layout (`task.path`)."""

    def problems(split: Split) -> list[Problem]:
        rows = _rows(config, split)
        return [_problem(row, f"gsm8k/{split}/{i}") for i, row in enumerate(rows)][: config.size]

    return Task("gsm8k", problems, lambda problem, completion: math_reward(problem.answer, completion))


def _rows(config: TaskConfig, split: Split) -> list[dict[str, str]]:
    if config.path is not None:
        if config.eval_path is not None:
            return read_jsonl(config.path if split == "train" else config.eval_path)
        return held_out(read_jsonl(config.path), split)
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB_NAME, "main", split="train" if split == "train" else "test"))
    except Exception as error:
        raise UserError(
            f"GSM8K cannot be loaded from the hub ({type(error).__name__}); give a file: task.path=gsm8k.jsonl"
        ) from error


def _problem(row: dict[str, str], name: str) -> Problem:
    if "question" not in row or "####" not in row.get("answer", ""):
        raise UserError(f"{name} is not in GSM8K's layout: 'question', and 'answer' that ends with '#### number'")
    solution = re.sub(r"<<.*?>>", "", row["answer"])
    return Problem(name, row["question"], solution.rsplit("####", 1)[1].strip().replace(",", ""), solution)
