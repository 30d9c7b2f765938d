"""The page of `forerun bench`: per drafter a heat map of speed-up over k and batch, and the whole table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forerun.report.format import times
from forerun.report.page import write_page
from forerun.report.plots import CATEGORIES, Figure, figure, heat_map
from forerun.tracking.files import write_atomically

Row = Mapping[str, Any]


def write_bench(result: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write `bench.json` (the cost table) and `bench.html`; returns their paths. Raises UserError on a disk error."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "bench.json"
    page = folder / "bench.html"
    drafted = [row for row in result["rows"] if row["k"] > 0]
    methods = list(dict.fromkeys(row["method"] for row in drafted))
    write_atomically(table, json.dumps(result, indent=2, default=str) + "\n")
    write_page(
        page,
        "bench",
        f"{result['recipe']}: what drafting brings here",
        {
            "result": result,
            "figures": {method: speedup_map([row for row in drafted if row["method"] == method]) for method in methods},
            "rows": [_cells(row) for row in drafted],
        },
    )
    return {"table": str(table), "page": str(page)}


def speedup_map(rows: list[Row]) -> Figure:
    """Speed-up over batch (across) and k (up)."""
    cells = {(row["k"], row["batch"]): row["speedup"] for row in rows}
    return figure([heat_map(cells, "{:.2f}x", "batch %{x}, k %{y}: %{text}")], "batch", "k", CATEGORIES)


def _cells(row: Row) -> list[str]:
    return [
        row["method"],
        str(row["k"]),
        str(row["batch"]),
        times(row["speedup"]),
        f"{row['acceptance_length']:.2f}",
        f"{row['round_cost']:.2f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['plain_tokens_per_s']:.0f}",
        f"{100 * row['draft_s'] / row['round_s']:.0f} %",
        f"{100 * row['verify_s'] / row['round_s']:.0f} %",
        f"{row['drafter_bytes'] / 1e6:.1f} MB",
        " ".join(f"{rate:.2f}" for rate in row["acceptance_per_position"]),
    ]
