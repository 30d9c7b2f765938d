"""From a row of a data set to a problem: which column is the question, which the answer.

The usual names are known: those of GSM8K, DAPO, verl, TRL and OpenR1. `task.columns` names others; a dot reaches into
an object (reward_model.ground_truth).
"""

from __future__ import annotations

import math
import re
from typing import Any

from forerun.chat import Messages, as_messages, check_text
from forerun.config import ColumnsConfig
from forerun.errors import UserError
from forerun.tasks.base import Problem
from forerun.tasks.files import Row, number_text
from forerun.tasks.reward import check_gold

QUESTION = ("question", "problem", "prompt", "messages")
ANSWER = ("answer", "ground_truth", "reward_model.ground_truth", "solution")
SYSTEM = ("system", "system_prompt")
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")  # a column of CSV, say


def problem_of(row: Row, columns: ColumnsConfig, where: str, name: str, needs_answer: bool = True) -> Problem:
    """The problem of a row.

    Args:
        where: the row, as the subject of an error.
        name: the problem's id where the row has none.
        needs_answer: false: a reward of the user's own judges without one.

    Raises UserError when the question or the answer is missing or cannot be read; it names the columns that exist.
    """
    question, messages = _question(row, columns, where)
    column, value = find(row, columns.answer, ANSWER)
    answer = _answer(value, f"{where}, column '{column}',")
    if answer is None and needs_answer:
        raise UserError(_missing(row, where, "answer", columns.answer, ANSWER))
    if answer is not None and needs_answer and (why := check_gold(answer)) is not None:
        raise UserError(f"{where}, column '{column}': the answer {answer!r} {why}, so no completion could be right")
    _, solution = find(row, columns.solution, ("solution",))
    _, own_name = find(row, columns.id, ("id",))
    for text in (question, answer or ""):
        check_text(text, where)
    return Problem(
        id=name if own_name is None else str(own_name),
        question=question,
        answer=answer or "",
        solution=solution if isinstance(solution, str) and column != "solution" else None,
        meta=row,
        messages=messages,
    )


def find(row: Row, named: str | None, usual: tuple[str, ...]) -> tuple[str, Any]:
    """The first column that has a value, and the value; None where no column has one."""
    for name in usual if named is None else (named,):
        if (value := _at(row, name)) is not None:
            return name, value
    return "", None


def _at(row: Any, name: str) -> Any:
    if isinstance(row, dict) and name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    return _at(row.get(head), rest) if dot and isinstance(row, dict) else None


def _question(row: Row, columns: ColumnsConfig, where: str) -> tuple[str, Messages | None]:
    """The last question as text, and all messages where there is more than that."""
    _, value = find(row, columns.question, QUESTION)
    _, system = find(row, columns.system, SYSTEM)
    if isinstance(value, str) or value is None:
        if value is None or not value.strip():
            raise UserError(_missing(row, where, "question", columns.question, QUESTION))
        if _MESSAGES_AS_TEXT.match(value):
            raise UserError(f"{where} has messages that are written as one text; give a list, in JSON lines or Parquet")
        messages = [{"role": "user", "content": value}]
    else:
        messages = _asked(as_messages(value, where), where)
    if "<image>" in messages[-1]["content"] and (row.get("images") or row.get("image")):
        raise UserError(f"{where} asks about an image, which this version does not support")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages[-1]["content"], messages if len(messages) > 1 else None


def _asked(messages: Messages, where: str) -> Messages:
    """The messages up to the last question: answers that follow it are what is to be learnt."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not users or not messages[users[-1]]["content"].strip():
        raise UserError(f"{where} has messages without a question: none of role 'user' has text")
    return messages[: users[-1] + 1]


def _answer(value: Any, where: str) -> str | None:
    """The answer as text; None for one that is missing."""
    if isinstance(value, list) and len(value) == 1:
        return _answer(value[0], where)
    if isinstance(value, list | dict | bytes):
        raise UserError(f"{where} has {type(value).__name__} of {len(value)} as its answer; give one text or number")
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    text = number_text(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return text if text.strip() else None


def _missing(row: Row, where: str, what: str, named: str | None, usual: tuple[str, ...]) -> str:
    names = " or ".join(f"'{name}'" for name in (usual if named is None else (named,)))
    return (
        f"{where} has no {'text' if what == 'question' else what} under {names}; its columns are "
        f"{', '.join(map(str, row)) or 'none'}; name yours with task.columns.{what}=NAME"
    )
