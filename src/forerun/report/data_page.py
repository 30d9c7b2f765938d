"""The page and the text of `forerun data`: the task as the model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forerun.report.page import write_page
from forerun.report.plots import Figure, bars, figure
from forerun.report.tables import as_text, table
from forerun.tasks.splits import REASONS


def write_data(result: Mapping[str, Any], path: Path) -> str:
    """Write the page; returns its path. Raises UserError on a disk error."""
    context = {
        "result": result,
        "facts": facts(result),
        "dropped": [[str(count), REASONS.get(reason, reason)] for reason, count in result["dropped"].items()],
        "histogram": _histogram(result["lengths"]["histogram"]),
    }
    write_page(path, "data", f"{result['task']}: what {result['model']} reads", context)
    return str(path)


def data_text(result: Mapping[str, Any]) -> str:
    """The same for a terminal, without the figure."""
    dropped = [[REASONS.get(reason, reason), str(count)] for reason, count in result["dropped"].items()]
    parts = [table(["Problems", ""], [*facts(result), *dropped], [1])]
    shown = zip(result["prompts"], result["answers"], strict=True)
    prompts = [f"--- prompt {i} (answer: {answer})\n{prompt}" for i, (prompt, answer) in enumerate(shown, 1)]
    return "\n".join([as_text(*parts), *prompts])


def facts(result: Mapping[str, Any]) -> list[list[str]]:
    """Name and value of every number but what is left out."""
    lengths = result["lengths"]
    return [
        ["for training", str(result["train"])],
        ["held out", str(result["eval"])],
        ["of these used (eval.prompts)", str(result["eval_used"])],
        ["tokens of a prompt, least", f"{lengths['min']:.0f}"],
        ["median", f"{lengths['median']:.0f}"],
        ["most", f"{lengths['max']:.0f}"],
        ["positions of the model", str(lengths["context"] or "not known")],
        [f"prompts that leave less than {lengths['max_new_tokens']} for the answer", str(lengths["crowded"])],
    ]


def _histogram(bins: list[Mapping[str, Any]]) -> Figure:
    middles = [(b["from"] + b["to"]) / 2 for b in bins]
    return figure([bars("prompts", middles, [b["count"] for b in bins], "--speculative")], "tokens", "prompts")
