"""The plan of a spec: stage times, speed-up with its error band, best k, split, lag, and what limits.

Seconds per step; speed-ups are plain over speculative. `recipe.plan_recipe` and `run.plan_run` call `plan` with what
they read from a recipe or a run. Results are plain data (`to_dict`) and rows of text (`text`, in `render`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.simulate.core.constants import round_cost_error
from forerun.simulate.core.cost_model import CostModel
from forerun.simulate.core.decode import AnalyticalEngine, EngineCosts
from forerun.simulate.core.operators import WEIGHT_BYTES, Tuning, operator_shares
from forerun.simulate.core.shapes import ModelShape
from forerun.simulate.core.step import Split, async_step, best_split, step_bound
from forerun.simulate.plan import sweeps
from forerun.simulate.plan.render import plan_text
from forerun.simulate.plan.spec import PlanSpec, check_k_and_lag, spec_from_dict
from forerun.simulate.plan.step_model import StepModel

FULL_TRAINING_BYTES = 18  # per parameter: bfloat16 weights, float32 masters, moments and gradients (docs/lora.md)


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
    costs: EngineCosts | None = None,
    machine: CostModel | None = None,
    model: ModelShape | None = None,
    assumed: Sequence[str] = (),
) -> PlanResult:
    """Predict a recipe's step, plain and speculative.

    Args:
        spec: what is planned, as a `PlanSpec` or a mapping of its fields.
        costs: an engine fitted to measurements (`calibrate.fit_engine`) instead of the analytical one.
        machine: the cost model of one machine instead of the analytical engine and learner.
        model: the policy's shape where the table does not know `spec.model`.
        assumed: sentences on where the spec comes from; they become notes.

    Raises:
        UserError: an impossible layout, a model that does not fit, an unknown name, a length or count that cannot be.
    """
    spec = spec if isinstance(spec, PlanSpec) else spec_from_dict(spec)
    check_k_and_lag(spec)
    steps = StepModel(spec, costs, machine, model)
    by_k = sweeps.sweep_k(steps)
    best_k = steps.best_k()
    k = best_k if spec.k is None else spec.k
    plain, fast = steps.split(0), steps.split(k)
    return PlanResult(
        spec=_spec_dict(spec),
        layout=asdict(steps.layout),
        plain=_arm(plain),
        speculative=_arm(fast) | {"alpha": steps.alpha(k), "k": float(k)},
        speedup=speedups(steps, plain, fast, steps.cost_error),
        best_k=best_k,
        schedule=sweeps.draft_schedule(steps),
        drafter=_drafter(steps, k),
        split={"generation_gpus": fast.generation_gpus, "training_gpus": fast.training_gpus},
        limits=_limits(steps, fast),
        by_k=by_k,
        heat_map=sweeps.sweep_k_and_acceptance(steps),
        acceptance_curve=sweeps.sweep_acceptance(steps, k),
        sweep=sweeps.sweep_gpus_and_lag(steps, k),
        what_if=sweeps.sweep_assumptions(steps, k),
        bands={} if machine is None else {"generation": machine.engine_band, "learner": machine.band},
        notes=[*assumed, *_notes(steps, k)],
    )


def _spec_dict(spec: PlanSpec) -> dict[str, Any]:
    values = asdict(spec) | {"acceptance_lengths": {str(k): v for k, v in spec.acceptance_lengths.items()}}
    return values | {"trace": f"{len(spec.trace)} lengths" if spec.trace else ""}


def _arm(split: Split) -> dict[str, float]:
    return asdict(split.stages) | {"step_s": split.step.step_s, "exposed_generation_s": split.step.exposed_s}


def speedups(steps: StepModel, plain: Split, fast: Split, error: float) -> dict[str, float]:
    """Speed-ups with the band that a relative `error` of the round cost gives, and the step if rollouts were free.

    Generation is compared on the same GPUs, the step with each arm on its own best split.
    """
    lag, generation_s = steps.spec.lag, fast.stages.generation_s
    slow, quick = (
        async_step(replace(fast.stages, generation_s=generation_s * factor), lag)
        for factor in (1 + error, 1 / (1 + error))
    )
    free = replace(steps.stages(0, steps.spec.gpus, steps.spec.gpus, 0), generation_s=0.0)
    generation = steps.generation_s(0, fast.generation_gpus, lag) / generation_s
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


def _drafter(steps: StepModel, k: int) -> dict[str, float]:
    """Size of the drafter and its share of a round at the mean batch."""
    if not k:
        return {}
    batch, context = _typical(steps)
    round_s = float(steps.costs.round_s(batch, k, context))
    step_s = float(steps.costs.draft_s(batch, context))
    params = float(steps.drafter.shape.params if steps.drafter.shape else 0)
    return {
        "params": params,
        "bytes": params * WEIGHT_BYTES[steps.spec.precision],
        "step_s": step_s,
        "share_of_round": k * step_s / round_s,
        "round_cost": round_s / float(steps.costs.plain_s(batch, context)),
    }


def _typical(steps: StepModel) -> tuple[np.float64, np.float64]:
    """Mean running batch and context of the plain rollout."""
    batch = max(steps.rollout(0, steps.spec.gpus, 0).mean_batch, 1.0)
    return np.float64(batch), np.float64(steps.spec.prompt_tokens + steps.lengths.mean() / 2)


def _limits(steps: StepModel, fast: Split) -> dict[str, dict[str, float]]:
    """Shares of the step by stage, and of a plain decode step by operator."""
    stages = asdict(fast.stages)
    limits = {"step": {name.removesuffix("_s"): value / sum(stages.values()) for name, value in stages.items()}}
    batch, context = _typical(steps)
    costs = steps.costs
    if isinstance(costs, AnalyticalEngine):

        def plain(tuning: Tuning) -> NDArray[np.float64]:
            moved = replace(costs, replica=replace(costs.replica, tuning=tuning))
            return np.atleast_1d(moved.plain_s(batch, context))

        shares = operator_shares(plain, costs.replica.tuning)
        limits["decode"] = {name: float(share[0]) for name, share in shares.items()}
    else:
        parts = {"weights and launches": costs.step_s, "rows": float(batch * costs.sequence_s)}
        parts["cache reads"] = float(batch * context * costs.cached_s)
        limits["decode"] = {name: seconds / sum(parts.values()) for name, seconds in parts.items()}
    return limits


def _notes(steps: StepModel, k: int) -> list[str]:
    spec, gpu = steps.spec, steps.gpu
    stages = steps.stages(0, spec.gpus, spec.gpus, 0)
    share, alpha = stages.generation_s / stages.total_s, steps.alpha(k)
    bound = step_bound(share, alpha)
    notes = [
        f"Synchronous, generation is {share:.0%} of the plain step: "
        f"no step speed-up beyond {bound:.2f}x at α = {alpha:.2f}.",
        steps.provenance,
    ]
    if steps.machine is not None:
        return notes
    peaks = (
        f"{gpu.name}: {gpu.flops['bf16'] / 1e12:.0f} TFLOP/s bf16 dense, {gpu.memory_bytes_per_s / 1e12:.2f} TB/s, "
        f"{gpu.link_bytes_per_s / 1e9:.0f} GB/s one-way link per GPU."
    )
    band = f"The band is the 90th percentile of the error of unfitted published round costs: {round_cost_error():.0%}."
    mfu = f"The learner's seconds rest on an MFU of {steps.learner.train_mfu:.2f}"
    known = (
        "as given." if spec.train_mfu else "assumed; with that of a run of yours (train_mfu=) they are your cluster's."
    )
    return [peaks, *notes, band, f"{mfu}, {known}", *_gpu_notes(steps, k)]


def _gpu_notes(steps: StepModel, k: int) -> list[str]:
    """What the plan takes for granted about GPUs, and `forerun train` does not do."""
    spec, notes = steps.spec, []
    units = spec.gpus // steps.layout.gpus
    if spec.lag == 0 and units > 1:
        fixed = best_split(spec.gpus, steps.layout.gpus, 0, lambda g, t: steps.stages(k, g, t, 0))
        notes.append(
            f"The step is that of {spec.gpus} GPUs which all generate and then all train. Forerun does not move GPUs "
            f"between the two: replicas and ranks keep theirs. With {fixed.generation_gpus} that generate and "
            f"{fixed.training_gpus} that train, in turn, it takes {fixed.step.step_s:.0f} s."
        )
    training = steps.split(k).training_gpus
    need, room = FULL_TRAINING_BYTES * steps.model.params, training * steps.gpu.memory_bytes
    if need > room:
        notes.append(
            f"The learner does not fit: weights, masters, moments and gradients of {steps.model.name} take "
            f"{need / 1e9:.0f} GB in bfloat16, and {training} x {steps.gpu.name} have {room / 1e9:.0f}. More GPUs, or "
            "train.lora (docs/lora.md)."
        )
    return notes
