"""Your own problems: a JSONL file with `question` (or `prompt`) and `answer`, optionally `id` and `solution`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks.base import Problem, Split, Task
from forerun.tasks.reward import math_reward


def build(config: TaskConfig, seed: int) -> Task:
    """Problems of `task.path`; held-out ones of `task.eval_path`, or else every tenth line of `task.path`."""
    if config.path is None:
        raise UserError("The jsonl task needs 'task.path', a file with one JSON object per line")
    path = config.path

    def problems(split: Split) -> list[Problem]:
        if config.eval_path is not None:
            name = path if split == "train" else config.eval_path
            rows = read_jsonl(name)
        else:
            name, rows = path, held_out(read_jsonl(path), split)
        return [_problem(row, name, i) for i, row in enumerate(rows)][: config.size]

    return Task("jsonl", problems, lambda problem, completion: math_reward(problem.answer, completion))


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        UserError: the file is missing, empty, or a line of it is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"Cannot read the data file {path}: {error.strerror}") from None
    rows = [_row(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"The data file {path} is empty; it needs one JSON object per line")
    return rows


def held_out(rows: list[dict[str, Any]], split: Split) -> list[dict[str, Any]]:
    """Every tenth row for evaluation, the others for training."""
    chosen = [row for i, row in enumerate(rows) if (i % 10 == 9) == (split == "eval")]
    if not chosen:
        raise UserError(f"{len(rows)} problems are too few to hold one tenth out for evaluation; set task.eval_path")
    return chosen


def _row(line: str, path: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"Line {number} of {path} is not JSON: {error.msg}") from None
    if not isinstance(row, dict):
        raise UserError(f"Line {number} of {path} holds {type(row).__name__}, not an object")
    return row


def _problem(row: dict[str, Any], path: str, index: int) -> Problem:
    question = row.get("question", row.get("prompt"))
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"Object {index + 1} of {path} has no text under 'question' or 'prompt'")
    name = str(row.get("id", f"{Path(path).stem}/{index}"))
    return Problem(name, question, str(row.get("answer", "")), row.get("solution"), row)
