"""What `forerun data` shows: the task as the model sees it, from the model's tokenizer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forerun.config import Recipe
from forerun.events import CountStream, EventStream, as_stage, with_progress
from forerun.tasks import Problem
from forerun.training.data import Data, encode_problem, prepare_data

SHOWN = 3  # prompts and answers
BINS = 24
QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}


def describe_data(recipe: Recipe) -> EventStream[dict[str, Any]]:
    """Counts, what is left out and why, lengths in tokens, and the first prompts as the model reads them.

    Raises UserError when no problem to train on is left; see also `load_data`.
    """
    data = yield from prepare_data(recipe)
    splits = data.splits
    problems = [*splits.problems("train"), *splits.held_out]
    lengths = yield from as_stage("counting tokens", with_progress(_lengths(problems, data), len(problems), "prompts"))
    first = problems[:SHOWN]
    return {
        "recipe": recipe.name,
        "task": data.task.name,
        "model": recipe.policy.model,
        "train": len(splits.train),
        "eval": len(splits.held_out),
        "eval_used": min(recipe.eval.prompts, len(splits.held_out)),
        "dropped": splits.dropped,
        "duplicates": splits.dropped.get("duplicate", 0),
        "conflicts": splits.conflicts,
        "in_both": splits.dropped.get("in_both", 0),
        "lengths": _summary(lengths, data.context, recipe.rollout.max_new_tokens),
        "answers": [problem.answer for problem in first],
        "prompts": [data.encoder.render(problem.prompt).text for problem in first],
        "warnings": data.warnings,
    }


def _lengths(problems: Sequence[Problem], data: Data) -> CountStream[list[int]]:
    """Tokens of every prompt."""
    lengths = []
    for problem in problems:
        lengths.append(len(encode_problem(problem, data.encoder)))
        yield len(lengths)
    return lengths


def _summary(lengths: Sequence[int], context: int | None, new_tokens: int) -> dict[str, Any]:
    """Quantiles and a histogram of lengths in tokens; `crowded`: prompts that leave less than `new_tokens`."""
    counts, edges = np.histogram(lengths, bins=min(BINS, max(lengths) - min(lengths) + 1))
    quantiles = {name: round(float(np.quantile(lengths, share)), 1) for name, share in QUANTILES.items()}
    return quantiles | {
        "mean": round(float(np.mean(lengths)), 1),
        "histogram": [
            {"from": round(float(low), 1), "to": round(float(high), 1), "count": int(count)}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
        "context": context,
        "max_new_tokens": new_tokens,
        "crowded": 0 if context is None else sum(length + new_tokens > context for length in lengths),
    }
