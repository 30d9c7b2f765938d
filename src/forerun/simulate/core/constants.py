"""Constants that ship with the package: of serving engines, and of speculation rounds.

Both are fitted to measurements by `validation/constants.py`, which writes `data/serving_constants.json` and
`data/round_constants.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from forerun.errors import UserError
from forerun.simulate.core.decode import IDEAL, RoundConstants
from forerun.simulate.core.operators import Replica, Tuning
from forerun.simulate.core.tables import load_table

Group = tuple[str, str, str]
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


def _from_list(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], FittedConstants]:
    found = {}
    for entry in entries:
        tuning = Tuning(*(entry[name] for name in TUNING_NAMES))
        found[tuple(entry["key"])] = FittedConstants(tuning, entry["rows"], tuple(entry["not_identified"]))
    return found


@cache
def serving_constants() -> ServingConstants:
    """The shipped constants, fitted on half of 689 measured rows."""
    table = load_table("serving_constants")
    return ServingConstants(_from_list(table["engines"]), _from_list(table["groups"]))


def round_constants(name: str) -> RoundConstants:
    """Round constants by name: "rl" (fitted to 2604.26779's RL-Zero), "serving" (SGLang on small batches), "ideal".

    Raises:
        UserError: another name.
    """
    if name not in ROUNDS:
        raise UserError(f"There are no round constants called {name!r}; there are {', '.join(ROUNDS)}.")
    return IDEAL if name == "ideal" else RoundConstants(**load_table("round_constants")[name])


def round_cost_error() -> float:
    """90th percentile of the relative error of c on published points that no constant was fitted to.

    Engines are taken with the constants of all their heads together: those of a head not yet measured are unknown.
    """
    return float(load_table("round_constants")["error_of_c"])
