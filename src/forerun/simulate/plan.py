"""What speculation will bring: stage times, speed-up with its error band, best k, split, lag, and what limits.

Conventions: seconds per step; speed-ups are plain over speculative. `plan` answers for hardware that one does not have,
`plan_run` for a run that one has, `plan_paper` sets the published cells beside ours. Results are plain data
(`to_dict`) and rows of text (`text`, in `render`).
Left out: prices; heterogeneous clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate import paper
from forerun.simulate.calibrate import FittedEngine, fit_run
from forerun.simulate.operators import WEIGHT_BYTES, Tuning
from forerun.simulate.planner import K_MAX, ROUNDS, Planner, PlanSpec, round_error, round_tuning, spec_from_dict
from forerun.simulate.render import plan_text
from forerun.simulate.round import Costs, Speculator, acceptance_from_lengths, best_budget, constant_acceptance
from forerun.simulate.step import Split, Stages, async_step, step_bound, without_generation
from forerun.simulate.validate import operator_shares

Floats = NDArray[np.float64]
HEAT_RATES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True, slots=True)
class PlanResult:
    """The answer. All mappings are plain data; `text` renders them as rows."""

    spec: dict[str, Any]
    layout: dict[str, int]
    plain: dict[str, float]
    speculative: dict[str, float]
    speedup: dict[str, float]
    best_k: int
    schedule: list[dict[str, float]]
    drafter: dict[str, float]
    split: dict[str, int]
    limits: dict[str, dict[str, float]]
    by_k: list[dict[str, float]]
    heat_map: list[dict[str, float]]
    sweep: list[dict[str, float]]
    what_if: list[dict[str, Any]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Rows of text."""
        return plan_text(self.to_dict())


def plan(spec: PlanSpec | Mapping[str, Any], costs: Costs | None = None) -> PlanResult:
    """Predict a recipe's step, plain and speculative.

    Args:
        spec: what is planned, as a `PlanSpec` or a mapping of its fields.
        costs: an engine fitted to measurements (`calibrate.fit_engine`) instead of the analytical one.

    Raises:
        UserError: an impossible layout, a model that does not fit, an unknown name, a length or count that cannot be.
    """
    spec = spec if isinstance(spec, PlanSpec) else spec_from_dict(spec)
    if spec.k is not None and spec.k < 0:
        raise UserError(f"k = {spec.k} draft tokens cannot be; 0 is plain decoding.")
    if spec.lag < 0:
        raise UserError(f"A policy lag of {spec.lag} cannot be; 0 is synchronous.")
    planner = Planner(spec, costs)
    by_k = _by_k(planner)
    fastest = min(by_k, key=lambda row: (row["step_s"], row["k"]))
    k = int(fastest["k"]) if spec.k is None else spec.k
    plain, fast = planner.split(0, spec.gpus, spec.lag), planner.split(k, spec.gpus, spec.lag)
    return PlanResult(
        spec=_spec_dict(spec),
        layout={"tensor": planner.layout.tensor, "data": planner.layout.data, "expert": planner.layout.expert},
        plain=_arm(plain),
        speculative=_arm(fast) | {"alpha": planner.alpha(k), "k": float(k)},
        speedup=_speedup(planner, plain, fast),
        best_k=int(fastest["k"]),
        schedule=_schedule(planner),
        drafter=_drafter(planner, k),
        split={"generation_gpus": fast.generation_gpus, "training_gpus": fast.training_gpus},
        limits=_limits(planner, fast),
        by_k=by_k,
        heat_map=_heat_map(planner),
        sweep=_sweep(planner, k),
        what_if=_what_if(planner, k),
        notes=_notes(planner, k),
    )


def _spec_dict(spec: PlanSpec) -> dict[str, Any]:
    values = asdict(spec) | {"acceptance_lengths": {str(k): v for k, v in spec.acceptance_lengths.items()}}
    return values | {"trace": f"{len(spec.trace)} lengths" if spec.trace else ""}


def _arm(split: Split) -> dict[str, float]:
    return asdict(split.stages) | {"step_s": split.step.step_s, "exposed_generation_s": split.step.exposed_s}


def _speedup(planner: Planner, plain: Split, fast: Split) -> dict[str, float]:
    """Speed-ups with the band that the error of c on published points gives, and the step if rollouts were free.

    Generation is compared on the same GPUs, the step with each arm on its own best split.
    """
    lag = planner.spec.lag
    error, generation_s = round_error(), fast.stages.generation_s
    slow, quick = (
        async_step(_with_generation(fast.stages, generation_s * factor), lag) for factor in (1 + error, 1 / (1 + error))
    )
    free = without_generation(planner.stages(0, planner.spec.gpus, planner.spec.gpus, 0))
    generation = planner.generation_s(0, fast.generation_gpus, lag) / generation_s
    return {
        "generation": generation,
        "generation_low": generation / (1 + error),
        "generation_high": generation * (1 + error),
        "step": plain.step.step_s / fast.step.step_s,
        "step_low": plain.step.step_s / slow.step_s,
        "step_high": plain.step.step_s / quick.step_s,
        "step_if_free": plain.step.step_s / free.total_s,
        "error_of_c": error,
    }


def _with_generation(stages: Stages, generation_s: float) -> Stages:
    return Stages(stages.data_s, stages.prepare_s, generation_s, stages.logprob_s, stages.train_s)


def _by_k(planner: Planner) -> list[dict[str, float]]:
    """Every k at the planned lag, each on its own best split; `round_cost` is the batch's mean, prefill included."""
    spec, rows = planner.spec, []
    for k in range(K_MAX + 1):
        split, alpha = planner.split(k, spec.gpus, spec.lag), planner.alpha(k)
        plain_s = planner.generation_s(0, split.generation_gpus, spec.lag)
        generation = plain_s / split.stages.generation_s
        row = {"k": k, "alpha": alpha, "generation_s": split.stages.generation_s, "step_s": split.step.step_s}
        rows.append(row | {"generation_speedup": generation, "round_cost": alpha / generation})
    return [row | {"step_speedup": rows[0]["step_s"] / row["step_s"]} for row in rows]


def _heat_map(planner: Planner) -> list[dict[str, float]]:
    """Speed-ups over k and acceptance rate, synchronous on all GPUs."""
    gpus, cells = planner.spec.gpus, []
    plain = planner.stages(0, gpus, gpus, 0)
    for k in range(1, K_MAX + 1):
        for rate in HEAT_RATES:
            alpha = float(constant_acceptance(rate).length(k))
            fast = planner.stages(k, gpus, gpus, 0, alpha)
            cells.append(
                {
                    "k": k,
                    "rate": rate,
                    "alpha": alpha,
                    "generation": plain.generation_s / fast.generation_s,
                    "step": plain.total_s / fast.total_s,
                }
            )
    return cells


def _sweep(planner: Planner, k: int) -> list[dict[str, float]]:
    """Step speed-up against GPU count and lag."""
    unit, rows = planner.layout.gpus, []
    counts = [planner.spec.gpus * factor // 4 for factor in (1, 2, 4, 8, 16)]
    for gpus in sorted({count // unit * unit for count in counts if count >= unit}):
        for lag in (0, 1, 2):
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


def _what_if(planner: Planner, k: int) -> list[dict[str, Any]]:
    """Acceptance a tenth lower and higher, and the round constants of other engines; synchronous."""
    gpus, alpha = planner.spec.gpus, planner.alpha(k)
    plain, rows = planner.stages(0, gpus, gpus, 0), []
    for name, accepted in (("drafts accepted -10 %", 0.9), ("as planned", 1.0), ("drafts accepted +10 %", 1.1)):
        fast = planner.stages(k, gpus, gpus, 0, min(1 + accepted * (alpha - 1), k + 1.0))
        rows.append(_changed(name, plain, fast))
    if isinstance(planner.costs, Speculator):
        for name in ROUNDS:
            other = Planner(planner.spec, planner.speculator(round_tuning(name)))
            rows.append(_changed(f"rounds={name}", plain, other.stages(k, gpus, gpus, 0)))
    return rows


def _changed(name: str, plain: Stages, fast: Stages) -> dict[str, Any]:
    generation = plain.generation_s / fast.generation_s
    return {"change": name, "generation_speedup": generation, "step_speedup": plain.total_s / fast.total_s}


def _schedule(planner: Planner) -> list[dict[str, float]]:
    """The k for each running batch that yields most tokens per second, as the row budget would choose."""
    context = planner.spec.prompt_tokens + float(np.mean(planner.lengths**2) / (2 * np.mean(planner.lengths)))
    budget = best_budget(planner.costs, planner.acceptance, context, [1, 2, 4, 8, 16, 32, 64, 128, 256], K_MAX)
    return [{"batch_up_to": min(edge, float(planner.spec.slots)), "k": k} for edge, k in budget.steps]


def _drafter(planner: Planner, k: int) -> dict[str, float]:
    """Size of the drafter and its share of a round at the mean batch."""
    costs = planner.costs
    if not isinstance(costs, Speculator) or not k:
        return {}
    batch, context = _typical(planner)
    round_s = float(costs.round_s(batch, k, context))
    step_s = float(costs.draft_s(batch, context))
    shape = costs.drafter.shape
    return {
        "params": float(shape.params if shape else 0),
        "bytes": float(shape.params if shape else 0) * WEIGHT_BYTES[planner.spec.precision],
        "step_s": step_s,
        "share_of_round": k * step_s / round_s,
        "round_cost": round_s / float(costs.plain_s(batch, context)),
    }


def _typical(planner: Planner) -> tuple[np.float64, np.float64]:
    """Mean running batch and context of the plain rollout."""
    batch = planner.batch_s(0, planner.spec.gpus, 0)[2]
    return np.float64(max(batch, 1.0)), np.float64(planner.spec.prompt_tokens + planner.lengths.mean() / 2)


def _limits(planner: Planner, fast: Split) -> dict[str, dict[str, float]]:
    """Shares of the step by stage, and of a plain decode step by operator."""
    stages = asdict(fast.stages)
    total_s = sum(stages.values())
    limits = {"step": {name.removesuffix("_s"): value / total_s for name, value in stages.items()}}
    if isinstance(planner.costs, Speculator):
        batch, context = _typical(planner)
        costs = planner.costs

        def plain(tuning: Tuning) -> Floats:
            moved = replace(costs, replica=replace(costs.replica, tuning=tuning))
            return np.atleast_1d(moved.plain_s(batch, context))

        limits["decode"] = {
            name: float(share[0]) for name, share in operator_shares(plain, costs.replica.tuning).items()
        }
    return limits


def _notes(planner: Planner, k: int) -> list[str]:
    spec, gpu = planner.spec, planner.gpu
    stages = planner.stages(0, spec.gpus, spec.gpus, 0)
    share, alpha = stages.generation_s / stages.total_s, planner.alpha(k)
    bound = step_bound(share, alpha)
    return [
        f"{gpu.name}: {gpu.flops['bf16'] / 1e12:.0f} TFLOP/s bf16 dense, {gpu.memory_bytes_per_s / 1e12:.2f} TB/s, "
        f"{gpu.link_bytes_per_s / 1e9:.0f} GB/s one-way link per GPU.",
        f"Synchronous, generation is {share:.0%} of the plain step: "
        f"no step speed-up beyond {bound:.2f}x at α = {alpha:.2f}.",
        f"The band is the 90th percentile of the error of unfitted published round costs: {round_error():.0%}.",
        planner.provenance,
    ]


def plan_paper() -> dict[str, Any]:
    """Every published number beside ours, what was calibrated on what, the assumptions, and their sensitivity."""
    rows = paper.paper_rows()
    return {
        "rows": rows,
        "calibration": dict(paper.CALIBRATION),
        "assumptions": {"8B": asdict(paper.Measured()), "235B": asdict(paper.Projected())},
        "sensitivity": paper.sensitivity(),
        "other_readings_of_2048": paper.Runs235B(paper.Projected()).at_2048(),
        "beyond_10_percent": [row for row in rows if row["role"] == "test" and not abs(row["error"]) <= 0.10],
    }


def plan_run(
    steps: Sequence[Mapping[str, float]], engine: FittedEngine | None = None, batch: float = 0.0, context: float = 0.0
) -> dict[str, Any]:
    """Calibrate on half of a run's steps, predict the other half, and say how the run would go otherwise.

    Args:
        steps: per step `<stage>_s` of the five stages, `tokens`, `acceptance` (α), optionally `k`.
        engine: costs from the run's benchmark; with it, `batch` and `context` answer for other k.

    Raises:
        UserError: too few steps or missing fields.
    """
    fit = fit_run(steps)
    tokens, alpha = (float(np.mean([step.get(name, 1.0) for step in steps])) for name in ("tokens", "acceptance"))
    k = round(float(np.mean([step.get("k", 0.0) for step in steps])))

    def step_of(scale: float, lag: int, factor: float = 1.0) -> dict[str, Any]:
        seconds = fit.predict_s(tokens * scale, alpha)
        seconds["generation"] *= factor
        result = async_step(Stages(*seconds.values()), lag)
        return {
            "step_s": result.step_s,
            "exposed_generation_s": result.exposed_s,
            "tokens_per_s": tokens * scale / result.step_s,
        }

    what_if = [{"change": "lag 1, generation on GPUs of its own"} | step_of(1.0, 1)]
    what_if += [{"change": f"batch x {scale:g}"} | step_of(scale, 0) for scale in (0.5, 2.0)]
    if engine is not None and k:
        rate = acceptance_from_lengths({k: alpha})
        now = float(engine.round_s(batch, k, context)) / alpha
        for other in range(K_MAX + 1):
            then = float(engine.round_s(batch, other, context)) / float(rate.length(other))
            what_if.append({"change": f"k = {other}"} | step_of(1.0, 0, then / now))
    return {
        "fitted_steps": list(fit.fitted_steps),
        "errors": fit.errors,
        "predicted": fit.predict_s(tokens, alpha) | step_of(1.0, 0),
        "what_if": what_if,
    }
