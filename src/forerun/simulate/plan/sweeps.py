"""Sweeps around one plan: by k, over k and acceptance, over GPUs and lag, under other assumptions.

Each function takes a `StepModel` and returns rows of plain data, one per cell; speed-ups are plain over speculative; a
cell that cannot be (α beyond k + 1) is absent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forerun.simulate.core.constants import ROUNDS, round_constants
from forerun.simulate.core.decode import AnalyticalEngine, best_k_by_batch, constant_acceptance, rate_for
from forerun.simulate.core.step import Stages
from forerun.simulate.plan.step_model import K_MAX, StepModel

LENGTHS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LAGS = (0, 1, 2)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def sweep_k(steps: StepModel) -> list[dict[str, float]]:
    """Every k at the planned lag, each on its own best split; `round_cost` is the batch's mean, prefill included."""
    rows: list[dict[str, float]] = []
    for k in range(K_MAX + 1):
        split, alpha = steps.split(k), steps.alpha(k)
        plain_s = steps.generation_s(0, split.generation_gpus, steps.spec.lag)
        generation = plain_s / split.stages.generation_s
        row = {"k": k, "alpha": alpha, "generation_s": split.stages.generation_s, "step_s": split.step.step_s}
        rows.append(row | {"generation_speedup": generation, "round_cost": alpha / generation})
    return [row | {"step_speedup": rows[0]["step_s"] / row["step_s"]} for row in rows]


def sweep_k_and_acceptance(steps: StepModel) -> list[dict[str, float]]:
    """Speed-ups over k and acceptance length, synchronous on all GPUs (the axes of a figure of 2604.26779).

    `rate` is the constant conditional rate that gives the cell's α at its k.
    """
    plain, cells = _synchronous(steps, 0), []
    for k in range(1, K_MAX + 1):
        for alpha in (length for length in LENGTHS if length <= k + 1):
            cell: dict[str, float] = {"k": k, "alpha": alpha, "rate": rate_for(k, alpha)}
            cells.append(cell | _speedups(plain, _synchronous(steps, k, alpha)))
    return cells


def sweep_acceptance(steps: StepModel, k: int) -> list[dict[str, float]]:
    """Speed-ups against the conditional rate: of the planned k, and of the k that is best at that rate; synchronous."""
    plain, rows = _synchronous(steps, 0), []
    for rate in RATES:
        lengths = constant_acceptance(rate).length(np.arange(K_MAX + 1.0))
        by_k = [_synchronous(steps, j, float(alpha)) for j, alpha in enumerate(lengths)]
        best = int(np.argmin([stages.total_s for stages in by_k]))
        row = {"rate": rate, "alpha": float(constant_acceptance(rate).length(k)), "best_k": best}
        planned = _speedups(plain, _synchronous(steps, k, row["alpha"]))
        at_best = {f"best_{name}": value for name, value in _speedups(plain, by_k[best]).items()}
        rows.append(row | planned | at_best)
    return rows


def _synchronous(steps: StepModel, k: int, alpha: float | None = None) -> Stages:
    return steps.stages(k, steps.spec.gpus, steps.spec.gpus, 0, alpha)


def _speedups(plain: Stages, fast: Stages) -> dict[str, float]:
    return {"generation": plain.generation_s / fast.generation_s, "step": plain.total_s / fast.total_s}


def sweep_gpus_and_lag(steps: StepModel, k: int) -> list[dict[str, float]]:
    """Step speed-up against GPU count (one machine: how many like it) and lag."""
    unit, rows = steps.layout.gpus, []
    counts = [steps.spec.gpus * factor // 4 for factor in (1, 2, 4, 8, 16)]
    for gpus in sorted({count // unit * unit for count in counts if count >= unit}):
        for lag in LAGS if gpus >= 2 * unit else LAGS[:1]:
            plain, fast = steps.split(0, gpus, lag), steps.split(k, gpus, lag)
            plain_s = steps.generation_s(0, fast.generation_gpus, lag)
            rows.append(
                {
                    "gpus": gpus,
                    "lag": lag,
                    "generation_gpus": fast.generation_gpus,
                    "plain_step_s": plain.step.step_s,
                    "step_s": fast.step.step_s,
                    "generation_speedup": plain_s / fast.stages.generation_s,
                    "step_speedup": plain.step.step_s / fast.step.step_s,
                }
            )
    return rows


def sweep_assumptions(steps: StepModel, k: int) -> list[dict[str, Any]]:
    """Acceptance a tenth lower and higher, and the round constants of other engines; synchronous."""
    alpha, changed = steps.alpha(k), {}
    for name, factor in (("drafts accepted -10 %", 0.9), ("as planned", 1.0), ("drafts accepted +10 %", 1.1)):
        changed[name] = _synchronous(steps, k, min(1 + factor * (alpha - 1), k + 1.0))
    if isinstance(steps.costs, AnalyticalEngine):
        for name in ROUNDS:
            other = StepModel(steps.spec, steps.analytical_engine(round_constants(name)), model=steps.model)
            changed[f"rounds={name}"] = _synchronous(other, k)
    plain, rows = _synchronous(steps, 0), []
    for name, stages in changed.items():
        found = _speedups(plain, stages)
        rows.append({"change": name, "generation_speedup": found["generation"], "step_speedup": found["step"]})
    return rows


def draft_schedule(steps: StepModel) -> list[dict[str, float]]:
    """The k for each running batch that yields most tokens per second, as the row budget would choose."""
    spec, lengths = steps.spec, steps.lengths
    context = spec.prompt_tokens + float(np.mean(lengths**2) / (2 * np.mean(lengths)))
    batches = sorted({min(batch, spec.slots) for batch in BATCHES})
    found = best_k_by_batch(steps.costs, steps.acceptance, context, batches, K_MAX)
    return [{"batch_up_to": min(size, float(spec.slots)), "k": k} for size, k in found]
