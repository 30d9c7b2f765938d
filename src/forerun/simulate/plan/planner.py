"""What speculation will bring: stage times, speed-up with its error band, best k, split, lag, and what limits.

Conventions: seconds per step; speed-ups are plain over speculative. `plan` answers for a spec, `plan_paper` sets the
published cells beside ours; `recipes.plan_recipe` and `run.plan_run` come here with what they read from a recipe or a
run. Results are plain data (`to_dict`) and rows of text (`text`, in `render`).
Left out: prices; heterogeneous clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.decode import Costs, Speculator
from forerun.simulate.core.machine import Machine
from forerun.simulate.core.operators import WEIGHT_BYTES, Tuning
from forerun.simulate.core.shapes import ModelShape
from forerun.simulate.core.step import Split, async_step, step_bound, without_generation
from forerun.simulate.plan import sweeps as surfaces
from forerun.simulate.plan.calibrate import FittedEngine
from forerun.simulate.plan.render import plan_text
from forerun.simulate.plan.spec import Planner, PlanSpec, round_error, spec_from_dict
from forerun.simulate.validation import paper
from forerun.simulate.validation.validate import operator_shares

Floats = NDArray[np.float64]


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
    acceptance_curve: list[dict[str, float]]
    sweep: list[dict[str, float]]
    what_if: list[dict[str, Any]]
    bands: dict[str, float]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Rows of text."""
        return plan_text(self.to_dict())


def plan(
    spec: PlanSpec | Mapping[str, Any],
    costs: Costs | None = None,
    machine: Machine | None = None,
    model: ModelShape | None = None,
    assumed: Sequence[str] = (),
) -> PlanResult:
    """Predict a recipe's step, plain and speculative.

    Args:
        spec: what is planned, as a `PlanSpec` or a mapping of its fields.
        costs: an engine fitted to measurements (`calibrate.fit_engine`) instead of the analytical one.
        machine: one machine instead of the analytical engine and learner.
        model: the shape of the policy where `spec.model` is no name that the table knows.
        assumed: sentences on where the spec comes from; they become notes.

    Raises:
        UserError: an impossible layout, a model that does not fit, an unknown name, a length or count that cannot be.
    """
    spec = spec if isinstance(spec, PlanSpec) else spec_from_dict(spec)
    check_k_and_lag(spec)
    planner = Planner(spec, costs, machine, model)
    by_k = surfaces.by_k(planner)
    fastest = min(by_k, key=lambda row: (row["step_s"], row["k"]))
    k = int(fastest["k"]) if spec.k is None else spec.k
    plain, fast = planner.split(0, spec.gpus, spec.lag), planner.split(k, spec.gpus, spec.lag)
    return PlanResult(
        spec=_spec_dict(spec),
        layout={"tensor": planner.layout.tensor, "data": planner.layout.data, "expert": planner.layout.expert},
        plain=_arm(plain),
        speculative=_arm(fast) | {"alpha": planner.alpha(k), "k": float(k)},
        speedup=speedup_of(planner, plain, fast, planner.cost_error),
        best_k=int(fastest["k"]),
        schedule=surfaces.schedule(planner),
        drafter=_drafter(planner, k),
        split={"generation_gpus": fast.generation_gpus, "training_gpus": fast.training_gpus},
        limits=_limits(planner, fast),
        by_k=by_k,
        heat_map=surfaces.heat_map(planner),
        acceptance_curve=surfaces.acceptance_curve(planner, k),
        sweep=surfaces.sweep(planner, k),
        what_if=surfaces.what_if(planner, k),
        bands={} if machine is None else {"generation": machine.engine_band, "learner": machine.band},
        notes=[*assumed, *_notes(planner, k)],
    )


def check_k_and_lag(spec: PlanSpec) -> None:
    """Refuse a negative k or lag.

    Raises:
        UserError: with what zero means.
    """
    if spec.k is not None and spec.k < 0:
        raise UserError(f"k = {spec.k} draft tokens cannot be; 0 is plain decoding.")
    if spec.lag < 0:
        raise UserError(f"A policy lag of {spec.lag} cannot be; 0 is synchronous.")


def _spec_dict(spec: PlanSpec) -> dict[str, Any]:
    values = asdict(spec) | {"acceptance_lengths": {str(k): v for k, v in spec.acceptance_lengths.items()}}
    return values | {"trace": f"{len(spec.trace)} lengths" if spec.trace else ""}


def _arm(split: Split) -> dict[str, float]:
    return asdict(split.stages) | {"step_s": split.step.step_s, "exposed_generation_s": split.step.exposed_s}


def speedup_of(planner: Planner, plain: Split, fast: Split, error: float) -> dict[str, float]:
    """Speed-ups with the band that a relative `error` of the round cost gives, and the step if rollouts were free.

    Generation is compared on the same GPUs, the step with each arm on its own best split.
    """
    lag, generation_s = planner.spec.lag, fast.stages.generation_s
    slow, quick = (
        async_step(replace(fast.stages, generation_s=generation_s * factor), lag)
        for factor in (1 + error, 1 / (1 + error))
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


def _drafter(planner: Planner, k: int) -> dict[str, float]:
    """Size of the drafter and its share of a round at the mean batch."""
    costs = planner.costs
    if not isinstance(costs, Speculator | FittedEngine) or not k:
        return {}
    batch, context = _typical(planner)
    round_s = float(costs.round_s(batch, k, context))
    if isinstance(costs, Speculator):
        shape, step_s = costs.drafter.shape, float(costs.draft_s(batch, context))
    else:
        shape, step_s = planner.drafter.shape, float(costs.draft_s(batch, 1))
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
    batch, context = _typical(planner)
    costs = planner.costs
    if isinstance(costs, Speculator):

        def plain(tuning: Tuning) -> Floats:
            moved = replace(costs, replica=replace(costs.replica, tuning=tuning))
            return np.atleast_1d(moved.plain_s(batch, context))

        limits["decode"] = {
            name: float(share[0]) for name, share in operator_shares(plain, costs.replica.tuning).items()
        }
    elif isinstance(costs, FittedEngine):
        parts = {"weights and launches": costs.step_s, "rows": float(batch * costs.sequence_s)}
        parts["cache reads"] = float(batch * context * costs.cached_s)
        limits["decode"] = {name: seconds / sum(parts.values()) for name, seconds in parts.items()}
    return limits


def _notes(planner: Planner, k: int) -> list[str]:
    spec, gpu = planner.spec, planner.gpu
    stages = planner.stages(0, spec.gpus, spec.gpus, 0)
    share, alpha = stages.generation_s / stages.total_s, planner.alpha(k)
    bound = step_bound(share, alpha)
    notes = [
        f"Synchronous, generation is {share:.0%} of the plain step: "
        f"no step speed-up beyond {bound:.2f}x at α = {alpha:.2f}.",
        planner.provenance,
    ]
    if planner.machine is not None:
        return notes
    peaks = (
        f"{gpu.name}: {gpu.flops['bf16'] / 1e12:.0f} TFLOP/s bf16 dense, {gpu.memory_bytes_per_s / 1e12:.2f} TB/s, "
        f"{gpu.link_bytes_per_s / 1e9:.0f} GB/s one-way link per GPU."
    )
    band = f"The band is the 90th percentile of the error of unfitted published round costs: {round_error():.0%}."
    mfu = f"The learner's seconds rest on an MFU of {planner.learner.train_mfu:.2f}"
    known = (
        "as given." if spec.train_mfu else "assumed; with that of a run of yours (train_mfu=) they are your cluster's."
    )
    return [peaks, *notes, band, f"{mfu}, {known}"]


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
