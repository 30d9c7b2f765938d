"""Constants that ship with the package: of serving engines, and of speculation rounds.

Both are fitted to measurements by `validation/constants.py`, which writes `data/serving_constants.json` and
`data/round_constants.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from forerun.errors import UserError
from forerun.simulate.core.decode import IDEAL, RoundConstants
from forerun.simulate.core.operators import Replica, Tuning
from forerun.simulate.core.tables import load_table

Group = tuple[str, ...]  # model, GPU, engine
TUNING_NAMES = tuple(field.name for field in fields(Tuning))
ROUNDS = ("rl", "serving", "ideal")


@dataclass(frozen=True, slots=True)
class FittedConstants:
    """Constants of one engine or group, the number of rows behind them, and the names that those did not identify."""

    tuning: Tuning
    rows: int
    not_identified: tuple[str, ...]


def group_of(replica: Replica, engine: str) -> Group:
    """Measurements that share constants: model (and precision other than bf16), GPU, engine."""
    precision = "" if replica.precision == "bf16" else f" {replica.precision}"
    return (replica.model.name + precision, replica.gpu.name, engine)


@dataclass(frozen=True, slots=True)
class ServingConstants:
    """Fitted constants by (family, backend), and by (model, GPU, engine)."""

    engines: dict[tuple[str, ...], FittedConstants]
    groups: dict[tuple[str, ...], FittedConstants]

    def find(self, group: Group, family: str) -> FittedConstants | None:
        """The group's constants, else its backend's for the family; None where neither was measured."""
        return self.groups.get(group) or self.engines.get((family, group[2].partition(" ")[0]))

    def tuning(self, group: Group, family: str) -> Tuning:
        """The constants that `find` gives, or the defaults."""
        found = self.find(group, family)
        return found.tuning if found else Tuning()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, four digits each."""
        return {"engines": _to_list(self.engines), "groups": _to_list(self.groups)}


def _to_list(table: Mapping[tuple[str, ...], FittedConstants]) -> list[dict[str, Any]]:
    return [
        {"key": list(key), "rows": c.rows, "not_identified": list(c.not_identified)}
        | {name: float(f"{value:.4g}") for name, value in asdict(c.tuning).items()}
        for key, c in sorted(table.items())
    ]


@cache
def serving_constants() -> ServingConstants:
    """The shipped constants, fitted on half of 689 measured rows."""
    engines, groups = (
        {
            tuple(entry["key"]): FittedConstants(
                Tuning(*(entry[name] for name in TUNING_NAMES)), entry["rows"], tuple(entry["not_identified"])
            )
            for entry in load_table("serving_constants")[part]
        }
        for part in ("engines", "groups")
    )
    return ServingConstants(engines, groups)


def round_constants(name: str) -> RoundConstants:
    """Constants "rl" (fitted to 2604.26779's RL-Zero), "serving" (SGLang, small batches) or "ideal", else UserError."""
    if name not in ROUNDS:
        raise UserError(f"There are no round constants called {name!r}; there are {', '.join(ROUNDS)}.")
    return IDEAL if name == "ideal" else RoundConstants(**load_table("round_constants")[name])


def round_cost_error() -> float:
    """90th percentile of the relative error of c on published points that no constant was fitted to.

    Engines are taken with the constants of all their heads together: those of a head not yet measured are unknown.
    """
    return float(load_table("round_constants")["error_of_c"])
