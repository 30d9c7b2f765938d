"""Published costs of a speculation round against the simulator's, two fitted constants per engine and head at most.

c = seconds of a round / seconds of a plain step at the same batch; speed-up of generation = α / c. The points, their
sources, the layouts that we had to assume and which points were fitted are in `data/round_costs.json`; the others are
the test. The points of 2604.26779, whose batches drain, are in `paper`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forerun.simulate.core.constants import serving_constants
from forerun.simulate.core.decode import AnalyticalEngine, RoundConstants, make_drafter
from forerun.simulate.core.fitting import map_fit
from forerun.simulate.core.hardware import load_hardware
from forerun.simulate.core.operators import Layout, Replica
from forerun.simulate.core.shapes import ModelShape, load_model
from forerun.simulate.core.tables import load_table

PRIOR_S, PRIOR_SPREAD = (0.3e-3, 0.5e-3), (1.5, 1.5)  # token_s, fixed_s: order of magnitude, very wide
NOISE = 0.15  # two constants cannot follow every row: residuals below 22 % keep their full weight


@dataclass(frozen=True, slots=True)
class RoundPoint:
    """One published round cost. `alpha` is None where the source gives no acceptance length."""

    engine: str
    label: str
    analytical: AnalyticalEngine
    batch: float
    context: float
    k: int
    c: float
    alpha: float | None
    fitted: bool


def _table() -> dict[str, Any]:
    return load_table("round_costs", "validation")


def _model(name: str) -> ModelShape:
    own = _table()["models"].get(name)
    return load_model(name if own is None else {**own, "_name_or_path": name})


def round_points() -> list[RoundPoint]:
    """All published points, one per k."""
    points: list[RoundPoint] = []
    for row in _table()["rows"]:
        replica = _replica(row)
        engine = AnalyticalEngine(replica, make_drafter(row["drafter"], replica.model))
        label = f"{row['model']} {row['drafter']}, {row['tensor']} x {row['gpu']}, batch {row['batch']}"
        for k, c in row["c"].items():
            points.append(
                RoundPoint(
                    engine=row["engine"],
                    label=label,
                    analytical=engine,
                    batch=row["batch"],
                    context=row["context"],
                    k=int(k),
                    c=c,
                    alpha=row["alpha"].get(k),
                    fitted=int(k) in row["fit"],
                )
            )
    return points


def _replica(row: dict[str, Any]) -> Replica:
    """The replica under the shipped constants of its backend; where a plain step is published, host time meets it."""
    model = _model(row["model"])
    tuning = serving_constants().tuning((model.name, row["gpu"], row["engine"]), model.family)
    layout = Layout(tensor=row["tensor"])
    replica = Replica(model, load_hardware(row["gpu"]), layout, row["precision"], 2.0, tuning)
    if "plain_ms" not in row:
        return replica
    bare = AnalyticalEngine(replace(replica, tuning=replace(tuning, host_s=0.0)))
    host_s = row["plain_ms"] / 1e3 - float(bare.plain_s(np.float64(row["batch"]), np.float64(row["context"])))
    return replace(replica, tuning=replace(tuning, host_s=max(host_s, 0.0)))


def round_cost(point: RoundPoint, rounds: RoundConstants) -> float:
    """Predicted c of a point."""
    engine = replace(point.analytical, rounds=rounds)
    batch, context = np.float64(point.batch), np.float64(point.context)
    return float(engine.round_s(batch, point.k, context) / engine.plain_s(batch, context))


def fit_rounds(points: Sequence[RoundPoint]) -> dict[str, RoundConstants]:
    """The two constants of each engine, from its fitted points alone; an engine without any takes another's.

    Where an engine was fitted with more than one kind of head, each also has constants of its own under
    `"<engine>, <drafter>"`: what a draft step costs beyond the device is the head's implementation, and published
    slopes differ the other way round than the device's times (EAGLE-1's pass is twice EAGLE-3's and its step cheaper).
    """
    fitted: dict[str, RoundConstants] = {}
    for engine in _table()["engines"]:
        name = engine["name"]
        own = [point for point in points if point.engine == name and point.fitted]
        fitted[name] = _fit(own) if own else fitted[engine["takes"]]
        heads = sorted({_head(point) for point in own})
        if len(heads) > 1:
            fitted |= {f"{name}, {head}": _fit([p for p in own if _head(p) == head]) for head in heads}
    return fitted


def _head(point: RoundPoint) -> str:
    return point.analytical.drafter.method


def constants_of(point: RoundPoint, fitted: Mapping[str, RoundConstants]) -> RoundConstants:
    """The constants of a point: its engine's for its head, else its engine's."""
    return fitted.get(f"{point.engine}, {_head(point)}", fitted[point.engine])


def _fit(points: Sequence[RoundPoint]) -> RoundConstants:
    def predict(x: np.ndarray) -> np.ndarray:
        return np.array([round_cost(point, RoundConstants(float(x[0]), float(x[1]))) for point in points])

    fit = map_fit(predict, np.array([point.c for point in points]), np.array(PRIOR_S), np.array(PRIOR_SPREAD), NOISE)
    return RoundConstants(float(fit.values[0]), float(fit.values[1]))


def round_errors(points: Sequence[RoundPoint] | None = None) -> list[dict[str, Any]]:
    """One row per point: published and predicted c, error, role, and whether the speed-up has the right sign."""
    points = round_points() if points is None else points
    fitted = fit_rounds(points)
    return [_compared(point, round_cost(point, constants_of(point, fitted))) for point in points]


def _compared(point: RoundPoint, predicted: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "engine": point.engine,
        "row": point.label,
        "k": point.k,
        "c_published": point.c,
        "c_predicted": predicted,
        "error": predicted / point.c - 1,
        "role": "fit" if point.fitted else "test",
    }
    if point.alpha is not None:
        published, ours = point.alpha / point.c, point.alpha / predicted
        row |= {"speedup_published": published, "speedup_predicted": ours, "sign_right": (published > 1) == (ours > 1)}
    return row
