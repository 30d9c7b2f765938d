"""The simulator against measurements: serving rows by family, group and limiting operator, and round costs.

Errors are relative, |predicted / measured - 1|. Constants are fitted on the half of a file's rows that
`ServingRow.fitted` names and reported on the other half, beside the package's own constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.constants import ServingConstants, serving_constants
from forerun.simulate.core.fitting import relative_errors
from forerun.simulate.core.operators import Tuning, operator_shares
from forerun.simulate.core.tables import load_table
from forerun.simulate.validation.round_costs import round_errors
from forerun.simulate.validation.serving import SPLIT_RULE, ServingRow, fit_serving, indices_by, predict_s, read_rows

Floats = NDArray[np.float64]
TARGETS = {"dense": 0.08, "experts": 0.15}  # median error on the test half


def validate(data_path: str | Path | None) -> dict[str, Any]:
    """Fit on half of a file's rows and report the error on the other half.

    Args:
        data_path: CSV with the columns of `serving.COLUMNS`; None: round costs alone, whose points are shipped.

    Returns:
        `families`, `operators` and `groups` (errors of the `fit` and the `test` half; `shipped`: the package's
        constants on the test half), `rounds` (published round costs), `skipped` (rows not covered, and why).

    Raises:
        UserError: the file cannot be read, or no row of it is covered.
    """
    found: dict[str, Any] = {
        "rounds": round_errors(),
        "round_engines": load_table("round_costs", "validation")["engines"],
    }
    if data_path is None:
        return {"rule": SPLIT_RULE, "rows": 0, "skipped": [], "families": [], "operators": [], "groups": [], **found}
    rows, skipped = read_rows(data_path)
    if not rows:
        first = skipped[0] if skipped else "the file is empty"
        raise UserError(f"None of the rows of {data_path} can be predicted; the first: {first}.")
    constants = fit_serving(rows)
    predicted, shipped = predict_all(rows, constants), predict_all(rows, serving_constants())
    limits = limiting_operators(rows, constants)

    def by(key_of: Callable[[int], str]) -> list[dict[str, Any]]:
        return _by_key(rows, predicted, shipped, key_of)

    families = by(lambda i: rows[i].family)
    for family in families:
        target, test = TARGETS[family["name"]], family["test"]
        family |= {"target_median": target, "reached": bool(test["rows"] and test["median"] <= target)}
    groups = by(lambda i: " / ".join(rows[i].group))
    for group in groups:
        group["not_identified"] = _vague(constants, group["name"])
    return {
        "rule": SPLIT_RULE,
        "rows": len(rows),
        "skipped": skipped,
        "families": families,
        "operators": by(lambda i: f"{rows[i].family}: {limits[i]}"),
        "groups": groups,
        **found,
        "worst_rows": _worst(rows, predicted),
    }


def predict_all(rows: Sequence[ServingRow], constants: ServingConstants) -> Floats:
    """Predicted seconds per output token of all rows, each under the most specific constants."""
    predicted = np.zeros(len(rows))
    for members, own, tuning in _groups(rows, constants):
        predicted[members] = predict_s(own, tuning)
    return predicted


def limiting_operators(rows: Sequence[ServingRow], constants: ServingConstants) -> list[str]:
    """The operator with the largest share of each row's predicted time: d log time / d log constant."""
    found = [""] * len(rows)
    for members, own, tuning in _groups(rows, constants):
        shares = operator_shares(partial(predict_s, own), tuning)
        names, table = list(shares), np.stack(list(shares.values()))
        for i, best in zip(members, table.argmax(0), strict=True):
            found[i] = names[best]
    return found


def _groups(
    rows: Sequence[ServingRow], constants: ServingConstants
) -> Iterator[tuple[list[int], list[ServingRow], Tuning]]:
    """Indices, rows and constants of each group; where neither it nor its backend was fitted, the package's."""
    for group, members in indices_by(rows, lambda row: row.group).items():
        own = [rows[i] for i in members]
        found = constants.find(group, own[0].family)
        yield members, own, found.tuning if found else serving_constants().tuning(group, own[0].family)


def _by_key(
    rows: Sequence[ServingRow], predicted: Floats, shipped: Floats, key_of: Callable[[int], str]
) -> list[dict[str, Any]]:
    measured, fitted = np.array([row.measured_s for row in rows]), np.array([row.fitted for row in rows])
    keys = np.array([key_of(i) for i in range(len(rows))])
    table = []
    for key in sorted(set(keys)):
        fit, test = (keys == key) & fitted, (keys == key) & ~fitted
        entry: dict[str, Any] = {"name": str(key), "fit": relative_errors(predicted[fit], measured[fit])}
        entry["test"] = relative_errors(predicted[test], measured[test])
        entry["shipped"] = relative_errors(shipped[test], measured[test])
        table.append(entry)
    return table


def _vague(constants: ServingConstants, name: str) -> list[str]:
    found = constants.groups.get(tuple(name.split(" / ")))
    return list(found.not_identified) if found else ["all: no row to fit, the engine's constants stand"]


def _worst(rows: Sequence[ServingRow], predicted: Floats, count: int = 10) -> list[dict[str, Any]]:
    """The test rows with the largest errors."""
    test = [i for i, row in enumerate(rows) if not row.fitted]
    ranked = sorted(test, key=lambda i: -abs(predicted[i] / rows[i].measured_s - 1))[:count]
    return [
        {
            "group": " / ".join(rows[i].group),
            "prompt_tokens": rows[i].prompt_tokens,
            "output_tokens": rows[i].output_tokens,
            "batch": rows[i].batch,
            "measured_ms": rows[i].measured_s * 1e3,
            "predicted_ms": float(predicted[i]) * 1e3,
        }
        for i in ranked
    ]
