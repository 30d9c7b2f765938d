"""`forerun score`: a recipe's rewards on the lines of a file, with neither model nor training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.config import Recipe
from forerun.errors import UserError
from forerun.tasks.base import Completion, Problem
from forerun.tasks.files import read_rows
from forerun.tasks.scoring import Score
from forerun.tasks.workers import RewardWorkers

if TYPE_CHECKING:
    from rich.table import Table

HEAD = 60  # characters of a completion that the table shows


def score_file(recipe: Recipe, path: str) -> list[tuple[Completion, Score]]:
    """The score of every line, in order.

    Args:
        path: JSONL of objects with `answer` and `completion`; optional are `question`, `id`, `finish_reason`, `tokens`
            (their number or their ids), and whatever the task's reward reads of a problem's `meta`.

    Raises:
        UserError: the file cannot be read, a line lacks one of the two, or no reward worker can start.
    """
    completions = [_completion(row, path, number) for number, row in enumerate(read_rows(path), 1)]
    workers = RewardWorkers(recipe.task, recipe.seed)
    try:
        futures = [workers.submit(completion) for completion in completions]
        return [(c, future.result()) for c, future in zip(completions, futures, strict=True)]
    finally:
        workers.close()


def as_json(scored: list[tuple[Completion, Score]]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"rows": [_as_json(score) for _, score in scored]}


def _as_json(score: Score) -> dict[str, Any]:
    row = {"reward": score.reward, "parts": dict(score.parts), "seconds": score.seconds}
    return row | {"failed": score.outcome != "scored", "fault": score.fault}


def as_table(scored: list[tuple[Completion, Score]]) -> Table:
    """What a terminal shows."""
    from forerun.report.tables import table

    mean = sum(score.reward for _, score in scored) / len(scored)
    rows = [_row(number, completion, found) for number, (completion, found) in enumerate(scored, 1)]
    title = f"{len(scored)} answers, mean reward {mean:.4g}"
    return table(["line", "reward", "parts", "seconds", "answer", "completion"], rows, (0, 1, 3), title)


def _row(number: int, completion: Completion, found: Score) -> list[str]:
    parts = " ".join(f"{name} {value:g}" for name, value in found.parts.items())
    said = found.fault or _tail(completion.text)
    return [str(number), f"{found.reward:g}", parts, f"{found.seconds:.3f}", _tail(completion.problem.answer), said]


def _completion(row: dict[str, Any], path: str, number: int) -> Completion:
    missing = [key for key in ("answer", "completion") if row.get(key) is None]
    if missing or not isinstance(row["completion"], str):
        what = f"has no {' and no '.join(missing)}" if missing else "has a completion that is no text"
        raise UserError(f'Object {number} of {path} {what}; it is to be like {{"answer": "5", "completion": "#### 5"}}')
    name = str(row.get("id", f"{Path(path).name}:{number}"))
    problem = Problem(name, str(row.get("question", "")), str(row["answer"]), None, row)
    tokens = row.get("tokens")
    ids, count = (tokens, len(tokens)) if isinstance(tokens, list) else ((), tokens)
    whole = row.get("text_with_special_tokens", row["completion"])
    return Completion(problem, row["completion"], whole, str(row.get("finish_reason", "eos")), ids, count)


def _tail(text: str) -> str:
    line = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(line.split())
    return line if len(line) <= HEAD else f"...{line[-HEAD:]}"
