"""A step before it is run, and the error of that prediction: what `forerun train` prints at its start and at its end.

Seconds; `compare` reads metric lines under the names of `tracking/metrics.py`. The error has two parts: what was
unknown before the run (lengths, acceptance, groups without a gradient), and the machine's constants. Evaluation,
checkpoints and the cold start are outside the step. A prediction takes well below 0.2 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from forerun.simulate.core.cost_model import CostModel
from forerun.simulate.core.rollout import lengths_with_mean
from forerun.simulate.core.step import Stages
from forerun.simulate.plan.cost_table import CostTable
from forerun.simulate.plan.planner import speedups
from forerun.simulate.plan.recipe import RecipePlan, combined_band, hardware_named, read_recipe
from forerun.simulate.plan.render import comparison_text, prediction_text
from forerun.simulate.plan.step_model import StepModel
from forerun.types import STAGES

Data = Mapping[str, Any]
TRAINED_BAND = 1.0  # of the train stage: any share of the groups may turn out without a gradient
CLUSTER_BAND = 0.5  # of an analytical engine's and an assumed MFU's seconds: nothing of this cluster was measured
DATA_BAND = 9.0  # of the data stage: milliseconds, right within a factor of ten


@dataclass(frozen=True, slots=True)
class Prediction:
    """The mean step of a run that has not begun. `bands`: relative error to expect of each stage and of the step."""

    recipe: str
    k: int
    alpha: float
    rollouts: int
    tokens: float  # generated per step
    stages: dict[str, float]
    step_s: float
    plain_generation_s: float
    speedup: dict[str, float]  # as in `PlanResult`; {} without speculation
    bands: dict[str, float]
    origin: str
    assumed: tuple[str, ...]
    basis: RecipePlan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "basis"}

    def text(self) -> str:
        """A few lines for the console."""
        return prediction_text(self.to_dict())


def predict_recipe(
    recipe: Data,
    machine: CostModel | None = None,
    *,
    device: str = "cpu",
    shape: Data | None = None,
    table: CostTable | None = None,
) -> Prediction:
    """Predict the mean step of a recipe.

    Args:
        recipe: the recipe as plain data (`Recipe.model_dump()`).
        machine: the cost model of a finished run (`run.calibrate_run`); None: from `table`, or nominal for `device`.
        device: "cpu", or the accelerator's name as torch gives it.
        shape: the policy's configuration as a dict, where it is known.
        table: what `forerun bench` measured on this machine.

    Raises:
        UserError: the model, the drafter or the accelerator is not known to the simulator.
    """
    basis = read_recipe(recipe, {}, table, shape, hardware_named(device))
    return _predict(basis if machine is None else replace(basis, machine=machine))


def _predict(basis: RecipePlan) -> Prediction:
    steps = StepModel(basis.spec, basis.costs, basis.machine, basis.model)
    k = 0 if not basis.drafts else steps.best_k() if basis.spec.k is None else basis.spec.k
    plain, fast = steps.split(0), steps.split(k)
    error = combined_band(steps.cost_error, basis.acceptance_band)
    return Prediction(
        recipe=basis.name,
        k=k,
        alpha=steps.alpha(k),
        rollouts=len(steps.lengths),
        tokens=float(steps.lengths.sum()),
        stages={name: float(getattr(fast.stages, f"{name}_s")) for name in STAGES},
        step_s=float(fast.step.step_s),
        plain_generation_s=float(plain.stages.generation_s),
        speedup=speedups(steps, plain, fast, error) if k else {},
        bands=_bands(basis, fast.stages, k),
        origin=steps.provenance,
        assumed=basis.assumed,
        basis=basis,
    )


def _bands(basis: RecipePlan, stages: Stages, k: int) -> dict[str, float]:
    """Relative error to expect of each stage, and of the step as their mean."""
    machine = basis.machine
    learner = machine.band if machine else CLUSTER_BAND
    engine = machine.engine_band if machine else CLUSTER_BAND
    acceptance = basis.acceptance_band if k else 0.0
    generation = combined_band(engine, basis.length_band, acceptance)
    shares = {name: getattr(stages, f"{name}_s") / stages.total_s for name in STAGES}
    learning = combined_band(learner, basis.length_band)
    train = combined_band(learning, TRAINED_BAND if machine else 0.0)
    bands = {"generation": generation, "logprob": learning, "train": train}
    step = sum(share * bands.get(name, learning) for name, share in shares.items())
    return bands | {"prepare": learner, "data": DATA_BAND, "step": step}


def compare(prediction: Prediction, metrics: Sequence[Data]) -> dict[str, Any]:
    """A prediction against the run.

    Args:
        metrics: the lines of `metrics.jsonl`; those without `time/generation` are passed over.

    Returns:
        Per stage and for the step `predicted`, `measured`, `error` (relative), `within` (the band) and `error_given`:
        the error of a prediction that is given the run's mean length, acceptance and share of trained tokens, which is
        that of the machine's constants; `inputs`: predicted and measured tokens and α; `text`.
    """
    rows = [row for row in metrics if row.get("time/generation") is not None]
    if not rows:
        return {"steps": 0, "stages": [], "inputs": {}, "text": "The run has no finished step to compare with."}
    given = _predict(informed(prediction.basis, rows))
    measured = {name: _mean(rows, f"time/{name}") for name in STAGES}
    measured["step"] = _mean(rows, "time/step") or sum(measured.values())
    stages = []
    for name, seconds in measured.items():
        ours, knowing = (p.step_s if name == "step" else p.stages[name] for p in (prediction, given))
        stages.append(_stage_error(name, ours, knowing, seconds, prediction.bands.get(name, float("inf"))))
    inputs = {
        "tokens": {"predicted": prediction.tokens, "measured": _mean(rows, "perf/gen_tokens")},
        "alpha": {"predicted": prediction.alpha, "measured": _mean(rows, "spec/acceptance_length") or 1.0},
    }
    found = {"steps": len(rows), "stages": stages, "inputs": inputs}
    return found | {"text": comparison_text(found)}


def _stage_error(name: str, ours_s: float, knowing_s: float, measured_s: float, band: float) -> dict[str, Any]:
    off = ours_s / measured_s - 1 if measured_s else float("nan")
    within = bool(measured_s / (1 + band) <= ours_s <= measured_s * (1 + band))
    known = knowing_s / measured_s - 1 if measured_s else float("nan")
    row = {"stage": name, "predicted": ours_s, "measured": measured_s, "error": off, "error_given": known}
    return {key: None if value != value else value for key, value in row.items()} | {"within": within}


def informed(basis: RecipePlan, rows: Sequence[Data]) -> RecipePlan:
    """The same recipe with the lengths, acceptance, prompts and trained share that a run's metric lines report."""
    spec, rollouts = basis.spec, basis.spec.prompts * basis.spec.samples
    mean = _mean(rows, "perf/gen_tokens") / rollouts or _mean(rows, "length/mean") or spec.mean_tokens
    lengths = lengths_with_mean(mean, spec.sigma, spec.cap_tokens, rollouts)
    values: dict[str, Any] = {"mean_tokens": mean, "trace": tuple(map(float, lengths))}
    values["trained"] = 1.0 - _mean(rows, "reward/zero_std_groups")
    if _mean(rows, "length/prompt_mean"):
        values["prompt_tokens"] = max(1, round(_mean(rows, "length/prompt_mean")))
    if acceptance := acceptance_of(rows):
        values["acceptance_lengths"] = acceptance
    return replace(basis, spec=replace(spec, **values), length_band=0.0, acceptance_band=0.0)


def acceptance_of(rows: Sequence[Data]) -> dict[int, float]:
    """α by k from the mean cumulative acceptance per position of a run, clipped not to rise; {} for a plain one."""
    lengths, alpha, last, k = {}, 1.0, 1.0, 1
    while any(row.get(name := f"spec/acceptance_pos_{k}") is not None for row in rows):
        last = min(_mean(rows, name), last)
        alpha += last
        lengths[k] = alpha
        k += 1
    return lengths


def _mean(rows: Sequence[Data], name: str) -> float:
    """Mean of a metric over the lines that have it; 0 where none has."""
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else 0.0
