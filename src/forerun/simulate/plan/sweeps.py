"""The surfaces around one plan: by k, over k and acceptance, over GPUs and lag, under other assumptions.

Conventions: each function takes a `Planner` and returns rows of plain data, one per cell; speed-ups are plain over
speculative; a cell that cannot be (α beyond k + 1) is absent. Left out: drawing, see `report/plan_page.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forerun.simulate.core.decode import Speculator, best_budget, constant_acceptance, rate_for
from forerun.simulate.core.step import Stages
from forerun.simulate.plan.spec import K_MAX, ROUNDS, Planner, round_tuning

HEAT_LENGTHS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LAGS = (0, 1, 2)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def by_k(planner: Planner) -> list[dict[str, float]]:
    """Every k at the planned lag, each on its own best split; `round_cost` is the batch's mean, prefill included."""
    spec, rows = planner.spec, []
    for k in range(K_MAX + 1):
        split, alpha = planner.split(k, spec.gpus, spec.lag), planner.alpha(k)
        plain_s = planner.generation_s(0, split.generation_gpus, spec.lag)
        generation = plain_s / split.stages.generation_s
        row = {"k": k, "alpha": alpha, "generation_s": split.stages.generation_s, "step_s": split.step.step_s}
        rows.append(row | {"generation_speedup": generation, "round_cost": alpha / generation})
    return [row | {"step_speedup": rows[0]["step_s"] / row["step_s"]} for row in rows]


def heat_map(planner: Planner) -> list[dict[str, float]]:
    """Speed-ups over k and acceptance length, synchronous on all GPUs (2604.26779 draws these two axes).

    `rate` is the constant conditional rate that gives the cell's α at its k.
    """
    gpus, cells = planner.spec.gpus, []
    plain = planner.stages(0, gpus, gpus, 0)
    for k in range(1, K_MAX + 1):
        for alpha in (length for length in HEAT_LENGTHS if length <= k + 1):
            fast = planner.stages(k, gpus, gpus, 0, alpha)
            cell: dict[str, float] = {"k": k, "alpha": alpha, "rate": rate_for(k, alpha)}
            cells.append(cell | _speedups(plain, fast))
    return cells


def acceptance_curve(planner: Planner, k: int) -> list[dict[str, float]]:
    """Speed-ups against the conditional rate: of the planned k, and of the k that is best at that rate; synchronous."""
    gpus, rows = planner.spec.gpus, []
    plain = planner.stages(0, gpus, gpus, 0)
    for rate in RATES:
        lengths = constant_acceptance(rate).length(np.arange(K_MAX + 1.0))
        steps = [planner.stages(j, gpus, gpus, 0, float(alpha)) for j, alpha in enumerate(lengths)]
        best = int(np.argmin([stages.total_s for stages in steps]))
        row = {"rate": rate, "alpha": float(constant_acceptance(rate).length(k)), "best_k": best}
        planned = planner.stages(k, gpus, gpus, 0, row["alpha"])
        at_best = {f"best_{name}": value for name, value in _speedups(plain, steps[best]).items()}
        rows.append(row | _speedups(plain, planned) | at_best)
    return rows


def _speedups(plain: Stages, fast: Stages) -> dict[str, float]:
    return {"generation": plain.generation_s / fast.generation_s, "step": plain.total_s / fast.total_s}


def sweep(planner: Planner, k: int) -> list[dict[str, float]]:
    """Step speed-up against GPU count (a machine: how many like it) and lag."""
    unit, rows = planner.layout.gpus, []
    counts = [planner.spec.gpus * factor // 4 for factor in (1, 2, 4, 8, 16)]
    for gpus in sorted({count // unit * unit for count in counts if count >= unit}):
        for lag in LAGS:
            if lag and gpus < 2 * unit:
                continue
            plain, fast = planner.split(0, gpus, lag), planner.split(k, gpus, lag)
            rows.append(
                {
                    "gpus": gpus,
                    "lag": lag,
                    "generation_gpus": fast.generation_gpus,
                    "plain_step_s": plain.step.step_s,
                    "step_s": fast.step.step_s,
                    "generation_speedup": planner.generation_s(0, fast.generation_gpus, lag) / fast.stages.generation_s,
                    "step_speedup": plain.step.step_s / fast.step.step_s,
                }
            )
    return rows


def what_if(planner: Planner, k: int) -> list[dict[str, Any]]:
    """Acceptance a tenth lower and higher, and the round constants of other engines; synchronous."""
    gpus, alpha = planner.spec.gpus, planner.alpha(k)
    plain, rows = planner.stages(0, gpus, gpus, 0), []
    for name, accepted in (("drafts accepted -10 %", 0.9), ("as planned", 1.0), ("drafts accepted +10 %", 1.1)):
        fast = planner.stages(k, gpus, gpus, 0, min(1 + accepted * (alpha - 1), k + 1.0))
        rows.append(_changed(name, plain, fast))
    if isinstance(planner.costs, Speculator):
        for name in ROUNDS:
            other = Planner(planner.spec, planner.speculator(round_tuning(name)), model=planner.model)
            rows.append(_changed(f"rounds={name}", plain, other.stages(k, gpus, gpus, 0)))
    return rows


def _changed(name: str, plain: Stages, fast: Stages) -> dict[str, Any]:
    found = _speedups(plain, fast)
    return {"change": name, "generation_speedup": found["generation"], "step_speedup": found["step"]}


def schedule(planner: Planner) -> list[dict[str, float]]:
    """The k for each running batch that yields most tokens per second, as the row budget would choose."""
    context = planner.spec.prompt_tokens + float(np.mean(planner.lengths**2) / (2 * np.mean(planner.lengths)))
    slots = planner.spec.slots
    batches = sorted({min(batch, slots) for batch in BATCHES})
    budget = best_budget(planner.costs, planner.acceptance, context, batches, K_MAX)
    return [{"batch_up_to": min(edge, float(slots)), "k": k} for edge, k in budget.steps]
