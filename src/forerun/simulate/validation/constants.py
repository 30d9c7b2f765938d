"""Fits the constants that ship in `core/data/`: `python -m forerun.simulate.validation.constants [MEASURED_ROWS.csv]`.

Writes `round_constants.json`, from the published runs, and, where measured serving rows are given,
`serving_constants.json`. A test compares what ships with what this module computes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import forerun.simulate.core
from forerun.simulate.core.tables import load_table
from forerun.simulate.validation.paper import measured_runs, round_cost_rows
from forerun.simulate.validation.round_costs import fit_rounds, round_cost, round_points
from forerun.simulate.validation.serving import SPLIT_RULE, fit_serving, read_rows

DATA = Path(str(forerun.simulate.core.__file__)).parent / "data"


def fit_round_constants() -> dict[str, Any]:
    """The constants of rounds by name, and the error of c on the published points that they were not fitted to."""
    points = round_points()
    fitted = fit_rounds(points)
    ours = [abs(round_cost(point, fitted[point.engine]) / point.c - 1) for point in points if not point.fitted]
    runs = [abs(row["error"]) for row in round_cost_rows() if row["role"] == "test"]
    return {
        "source": "rl: 2604.26779, Tables 2 and 4, RL-Zero; serving: SpecForge's dashboard; both fitted by "
        "forerun.simulate.validation.constants",
        "rl": asdict(measured_runs().rounds),
        "serving": asdict(fitted["sglang specforge"]),
        "error_of_c": float(np.quantile(ours + runs, 0.9)),
    }


def fit_serving_constants(path: str | Path) -> dict[str, Any]:
    """The constants of serving engines, fitted on half of a file's rows."""
    rows, _ = read_rows(path)
    return {"source": load_table("serving_constants")["source"], "rule": SPLIT_RULE, **fit_serving(rows).to_dict()}


def _write(name: str, table: Mapping[str, Any]) -> None:
    (DATA / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the tables."""
    _write("round_constants", fit_round_constants())
    if len(sys.argv) > 1:
        _write("serving_constants", fit_serving_constants(sys.argv[1]))


if __name__ == "__main__":
    main()
