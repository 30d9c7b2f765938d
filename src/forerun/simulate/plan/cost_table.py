"""The cost table that `forerun bench` writes, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forerun.errors import UserError
from forerun.simulate.core.decode import rate_for

Row = Mapping[str, Any]
PLAIN_METHODS = ("none", "plain")
NEEDED = ("method", "k", "batch", "context", "plain_step_s")
DRAFTING_NEEDED = ("round_s",)
PARTS_SLACK = 1.2  # parts are means over all rounds, the round a median over the rounds of full batches


@dataclass(frozen=True, slots=True)
class CostTable:
    """Seconds of plain steps and of rounds on one machine with one policy.

    Fields of the rows: section "Cost table" of `docs/simulator.md`.
    """

    machine: Any
    versions: Any
    policy: Any
    rows: tuple[Row, ...]

    @property
    def methods(self) -> list[str]:
        """Drafting methods that were measured, in the order of the file."""
        return list(dict.fromkeys(str(row["method"]) for row in self.rows if row["k"] > 0))

    def of(self, method: str) -> list[Row]:
        """The rows of a method, and every plain row. Raises UserError when the method was not measured."""
        if method not in self.methods and method not in PLAIN_METHODS:
            known = ", ".join(self.methods) or "plain decoding only"
            raise UserError(f"The cost table has no rows of {method!r}; it has {known}. Run the benchmark with it.")
        return [row for row in self.rows if row["k"] == 0 or row["method"] == method]

    def acceptance(self, method: str) -> dict[int, float]:
        """Acceptance length for each measured k, the mean over batches; below the first one from its positions.

        A position's rate is cumulative (all drafts up to it were accepted). Noise is clipped: a length does not fall
        with k, and grows by at most the chance that all drafts before were accepted.
        """
        rows = [row for row in self.of(method) if row["k"] > 0 and row.get("acceptance_length")]
        if not rows:
            return {}
        ks = sorted({int(row["k"]) for row in rows})
        measured = {k: float(np.mean([row["acceptance_length"] for row in rows if row["k"] == k])) for k in ks}
        positions = [row.get("acceptance_per_position") or [] for row in rows if row["k"] == ks[0]]
        for k in range(1, ks[0]):
            known = [1.0 + sum(rates[:k]) for rates in positions if len(rates) >= k]
            measured |= {k: float(np.mean(known))} if known else {}
        return _possible(measured)


def _possible(lengths: Mapping[int, float]) -> dict[int, float]:
    """Acceptance lengths by k, clipped to those of conditional rates between 0 and 1."""
    found: dict[int, float] = {}
    before, alpha, reached = 0, 1.0, 1.0
    for k in sorted(lengths):
        gap = k - before
        gain = min(max(lengths[k] - alpha, 0.0), gap * reached)
        rate = rate_for(gap, 1.0 + gain / reached) if gain > 0 else 0.0
        before, alpha, reached = k, alpha + gain, reached * rate**gap
        found[k] = alpha
    return found


def read_cost_table(path: str | Path) -> CostTable:
    """Read the cost table of `forerun bench`. Raises UserError for another schema or a number that cannot be."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the cost table {path}: {error}; forerun bench writes one.") from None
    held = data if isinstance(data, dict) else {}
    missing = [name for name in ("machine", "versions", "policy", "rows") if name not in held]
    if missing or not isinstance(held["rows"], list):
        lacks = f"it lacks {', '.join(missing)}" if missing else "its rows are no list"
        raise UserError(f"{path} is no cost table: {lacks}; forerun bench writes one.")
    for number, row in enumerate(data["rows"], 1):
        check_row(row, f"Row {number} of {path}")
    return CostTable(data["machine"], data["versions"], data["policy"], tuple(data["rows"]))


def check_row(row: Row, where: str) -> None:
    """Refuse a row that lacks a number or has one that cannot be, with a UserError that names `where`."""
    drafts = isinstance(row, Mapping) and bool(row.get("k"))
    for name in (*NEEDED, *(DRAFTING_NEEDED if drafts else ())):
        value = row.get(name) if isinstance(row, Mapping) else None
        if value is None or (name != "method" and not isinstance(value, int | float)):
            needs = ", ".join((*NEEDED, *DRAFTING_NEEDED))
            raise UserError(f"{where} has {name}={value!r}; it needs numbers in {needs}.")
    if min(row["batch"], row["plain_step_s"]) <= 0 or min(row["k"], row["context"]) < 0:
        raise UserError(
            f"{where} has batch {row['batch']}, plain_step_s {row['plain_step_s']}, k {row['k']} and context "
            f"{row['context']}; batch and seconds must be positive, the others not negative."
        )
    if drafts and row["round_s"] <= 0:
        raise UserError(f"{where} has round_s {row['round_s']}; it must be positive.")
    parts_s = (row.get("draft_s") or 0.0) + (row.get("verify_s") or 0.0)
    if drafts and parts_s > PARTS_SLACK * row["round_s"]:
        raise UserError(
            f"{where} has draft_s + verify_s = {parts_s:.4g} s in a round of {row['round_s']:.4g} s; they are parts of "
            "it."
        )
