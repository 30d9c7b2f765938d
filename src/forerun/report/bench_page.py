"""The page of `forerun bench`: per drafter a heat map of speed-up over k and batch, and the whole table.

Left out: the measurement (`bench.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forerun.report.page import figure_html, figures_html, page_html, table_html, text
from forerun.tracking.files import write_atomically

Row = Mapping[str, Any]
_HEAD = ("Drafter", "k", "Batch", "Speed-up", "Tokens per round", "Round cost", "Tokens/s", "Plain tokens/s",
         "Drafting", "Judging", "Weights", "Accepted by position")  # fmt: skip


def write_bench(result: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write `bench.json` (the cost table) and `bench.html` into `folder`; returns their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"table": folder / "bench.json", "page": folder / "bench.html"}
    write_atomically(paths["table"], json.dumps(result, indent=2, default=str) + "\n")
    write_atomically(paths["page"], page_html(f"{result['recipe']}: what drafting brings here", _body(result)))
    return {name: str(path) for name, path in paths.items()}


def _body(result: Mapping[str, Any]) -> str:
    drafted = [row for row in result["rows"] if row["k"] > 0]
    methods = list(dict.fromkeys(row["method"] for row in drafted))
    maps = [
        figure_html(f"heat-{method}", method, heat_map([r for r in drafted if r["method"] == method]), _CAPTION)
        for method in methods
    ]
    facts = f"{result['policy']}, temperature {result['temperature']}, {result['machine']}"
    parts = [f"<h1>{text(result['recipe'])}: what drafting brings here</h1>", f'<p class="muted">{text(facts)}</p>']
    return "\n".join([*parts, figures_html(maps) or "", table_html(_HEAD, map(_cells, drafted), range(1, 11))])


_CAPTION = "Tokens per second over plain decoding of the same prompts in the same run; above 1 it pays."


def heat_map(rows: Sequence[Row]) -> dict[str, Any]:
    """Speed-up over batch (across) and k (up)."""
    ks, batches = sorted({r["k"] for r in rows}), sorted({r["batch"] for r in rows})
    at = {(r["k"], r["batch"]): r["speedup"] for r in rows}
    values = [[at.get((k, b)) for b in batches] for k in ks]
    words = [["" if v is None else f"{v:.2f}x" for v in row] for row in values]
    trace = {
        "type": "heatmap", "x": [str(b) for b in batches], "y": [str(k) for k in ks], "z": values, "text": words,
        "texttemplate": "%{text}", "zmid": 1.0, "colorscale": "RdBu", "reversescale": True, "showscale": False,
        "hovertemplate": "batch %{x}, k %{y}: %{text}<extra></extra>",
    }  # fmt: skip
    layout = {"xaxis.title.text": "batch", "yaxis.title.text": "k", "xaxis.type": "category", "yaxis.type": "category"}
    return {"data": [trace], "layout": layout}


def _cells(row: Row) -> list[str]:
    share = 100 / row["round_s"]
    return [
        row["method"], str(row["k"]), str(row["batch"]), f"{row['speedup']:.2f}x", f"{row['acceptance_length']:.2f}",
        f"{row['round_cost']:.2f}", f"{row['tokens_per_s']:.0f}", f"{row['plain_tokens_per_s']:.0f}",
        f"{share * row['draft_s']:.0f} %", f"{share * row['verify_s']:.0f} %", f"{row['drafter_bytes'] / 1e6:.1f} MB",
        " ".join(f"{a:.2f}" for a in row["acceptance_per_position"]),
    ]  # fmt: skip
