"""A finished run: its folder read, its machine calibrated, and its step predicted under other settings.

Metrics are read under the names of `tracking/metrics.py`. `rollouts.jsonl` may keep only some rollouts of a step: their
lengths are then scaled to the step's own mean and longest. Not supported: engines on several GPUs, whose run folder
does not name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.cost_model import CostModel, LearnerWork
from forerun.simulate.core.decode import COSTS_AS, METHODS
from forerun.simulate.core.hardware import Hardware, load_hardware, nominal_cpu
from forerun.simulate.core.shapes import read_config
from forerun.simulate.plan.calibrate import RULE, RunCalibration, StepRecord, calibrate
from forerun.simulate.plan.planner import plan
from forerun.simulate.plan.predict import acceptance_of
from forerun.simulate.plan.recipe import RecipePlan, read_recipe
from forerun.simulate.plan.spec import PlanSpec, spec_from_dict
from forerun.simulate.plan.step_model import K_MAX, StepModel
from forerun.tracking.reader import read_json, read_lines, read_metrics
from forerun.types import STAGES

Floats = NDArray[np.float64]
Data = Mapping[str, Any]
NOT_DRAFTED = ("The run did not draft: what a round adds is nominal, so its speed-ups are right within 40 % at best.",)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the calibration reads of a run folder."""

    path: Path
    rows: list[dict[str, Any]]  # metric lines of finished steps, merged per step, ascending
    samples: dict[int, list[dict[str, Any]]]  # kept rollouts by step
    env: dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "metrics.jsonl").is_file()


def read_run(folder: Path | str) -> RunRecord:
    """Read a run folder. Raises UserError without metrics of a finished step."""
    path = Path(folder)
    if not is_run(path):
        raise UserError(f"{path} holds no metrics.jsonl; give the folder of a run, for example runs/latest.")
    broken: list[str] = []  # of a run that was killed: a torn last line is no error
    metrics = read_metrics(path / "metrics.jsonl", broken)
    rows = [row for row in metrics if row.get("time/generation") is not None]
    if not rows:
        raise UserError(f"The run in {path} has not finished a step yet; there is nothing to calibrate on.")
    samples: dict[int, list[dict[str, Any]]] = {}
    for line in read_lines(path / "rollouts.jsonl", broken):
        samples.setdefault(line["step"], []).append(line)
    return RunRecord(path, rows, samples, read_json(path / "env.json", broken))


def records(run: RunRecord, recipe: Data) -> list[StepRecord]:
    """The steps of a run as the calibration takes them. Raises UserError when a metric is missing."""
    return [_record(row, run.samples.get(row["step"], []), recipe) for row in run.rows]


def _record(row: Data, kept: Sequence[Data], recipe: Data) -> StepRecord:
    needed = ("perf/gen_tokens", "length/mean", *(f"time/{stage}" for stage in STAGES))
    missing = [name for name in needed if row.get(name) is None]
    if missing:
        raise UserError(f"Step {row['step']} of the run lacks {', '.join(missing)}; it cannot be calibrated on.")
    reward_s = float(row.get("time/reward") or 0.0)
    seconds = {stage: float(row[f"time/{stage}"]) for stage in STAGES}
    seconds["generation"] = max(seconds["generation"] - reward_s, 1e-6)
    drafter_s = min(float(row.get("time/draft_train") or 0.0), seconds["train"])
    seconds["train"] -= drafter_s
    count = max(1, round(row["perf/gen_tokens"] / row["length/mean"]))
    tokens = _spread(np.array([float(s["tokens"]) for s in kept if s.get("tokens")]), count, row)
    prompt_tokens = float(row.get("length/prompt_mean") or 1.0)
    plain_s = row.get("compare/plain_s")
    return StepRecord(
        step=row["step"],
        seconds=seconds,
        reward_s=reward_s,
        drafter_s=drafter_s,
        tokens=tokens,
        rounds=_rounds(tokens, kept, row),
        trained_tokens=_trained(tokens, kept, row, prompt_tokens),
        prompt_tokens=prompt_tokens,
        groups=max(1, count // recipe["train"]["samples_per_prompt"]),
        drafted=row.get("spec/rounds") is not None,
        compare_s=None if plain_s is None else float(plain_s),
        compare_tokens=float(row.get("compare/plain_tokens") or row["perf/gen_tokens"]),
    )


def _spread(kept: Floats, count: int, row: Data) -> Floats:
    """Lengths of all rollouts of a step: the kept ones, or as many like them with the step's sum and longest."""
    if len(kept) == count:
        return kept
    shape = np.resize(kept, count) if len(kept) else np.full(count, float(row["length/mean"]))
    longest = float(row.get("length/max") or shape.max())
    for _ in range(8):
        shape = np.clip(shape * row["perf/gen_tokens"] / shape.sum(), 1.0, longest)
    shape[int(np.argmax(shape))] = longest
    return shape


def _rounds(tokens: Floats, kept: Sequence[Data], row: Data) -> Floats:
    """Passes of each rollout: known where it was kept, else its tokens over the step's tokens per pass."""
    known = [float(s["rounds"]) for s in kept if s.get("rounds")]
    if len(known) == len(tokens):
        return np.array(known)
    drafting, alpha = float(row.get("spec/rounds") or 0.0), float(row.get("spec/acceptance_length") or 1.0)
    total = float(row["perf/gen_tokens"])
    passes = drafting + max(total - alpha * drafting, 0.0)
    return np.maximum(tokens * passes / total, 1.0)


def _trained(tokens: Floats, kept: Sequence[Data], row: Data, prompt_tokens: float) -> float:
    """Tokens of the rollouts with an advantage: by rollout where all are kept, else by the share of groups."""
    advantages = [s["advantage"] for s in kept if s.get("advantage") is not None]
    if len(advantages) == len(tokens):
        carries = np.array(advantages) != 0.0
        return float((tokens[carries] + prompt_tokens).sum())
    share = 1.0 - float(row.get("reward/zero_std_groups") or 0.0)
    return share * float((tokens + prompt_tokens).sum())


def calibrate_run(folder: Path | str, recipe: Data) -> RunCalibration:
    """This machine's constants from a run on it.

    Args:
        recipe: the run's own recipe as plain data (its config.resolved.yaml).

    Raises:
        UserError: no run, too few steps, or a model that the simulator does not know.
    """
    run = read_run(folder)
    return _calibrated(run, recipe, _basis(run, recipe))


def _basis(run: RunRecord, recipe: Data) -> RecipePlan:
    """The run's recipe on a nominal machine like the one of env.json; its own policy where it was saved."""
    saved = run.path / "hf" / "policy" / "config.json"
    shape = read_config(saved) | {"_name_or_path": recipe["policy"]["model"]} if saved.is_file() else None
    method = str(recipe["speculation"]["method"])
    known = method == "none" or COSTS_AS.get(method, method) in METHODS
    # The steps of the run price a drafter that the simulator does not know: its nominal costs are verification alone.
    nominal = recipe if known else {**recipe, "speculation": {**recipe["speculation"], "method": "ngram"}}
    basis = read_recipe(nominal, {}, None, shape, hardware_of(run.env))
    if basis.machine is None:
        raise UserError(
            f"The run in {run.path} used rollout.engine={recipe['rollout']['engine']}, whose GPUs it does not name; "
            "only runs of the local engine can be calibrated."
        )
    return basis if known else replace(basis, spec=replace(basis.spec, method=method))


def hardware_of(env: Data) -> Hardware:
    """The hardware that a run's env.json describes; without one, a CPU of two cores."""
    devices = env.get("devices") or []
    if devices:
        return load_hardware(str(devices[0]))
    cpu = env.get("cpu") or {}
    return nominal_cpu(int(cpu.get("cores") or 2), cpu.get("flags") or (), env.get("memory_gib"))


def _calibrated(run: RunRecord, recipe: Data, basis: RecipePlan) -> RunCalibration:
    assert basis.machine is not None
    spec = basis.spec
    drafted = [row["spec/k_mean"] for row in run.rows if row.get("spec/k_mean")]
    k = 0 if not drafted else spec.k if spec.k and basis.drafts else round(float(np.mean(drafted)))
    work = LearnerWork(0.0, spec.logprob_passes, spec.train_passes, spec.updates)
    return calibrate(records(run, recipe), basis.machine, k, spec.slots, work)


def plan_run(folder: Path | str, recipe: Data, changes: Data | None = None) -> dict[str, Any]:
    """Calibrate on half of a run's steps, test on the other half, and say how the run would go otherwise.

    Args:
        recipe: the run's own recipe as plain data.
        changes: keys of `PlanSpec` that the plan sets differently from the run.

    Raises:
        UserError: as of `calibrate_run`; other hardware than the run's; an unknown key.

    Returns:
        `run`, `rule`, `calibration` (fitted and tested steps, constants in seconds, errors per stage, what was not
        identified), `now` (the run's mean step), `what_if` (other k, lag, batch, slots), `plan` (a `PlanResult`).
    """
    changes = changes or {}
    other = next((key for key in ("hardware", "gpu", "model", "precision", "engine") if key in changes), None)
    if other is not None:
        raise UserError(
            f"{other}={changes[other]} is not what the run ran on, and a run speaks for its own machine only: plan its "
            f"config.resolved.yaml with {other}=."
        )
    run = read_run(folder)
    basis = _basis(run, recipe)
    fit = _calibrated(run, recipe, basis)
    spec = _typical(run, recipe, basis.spec, fit)
    planned = spec_from_dict({**asdict(spec), "k": fit.k, **changes})
    answer = plan(planned, machine=fit.machine, model=basis.model, assumed=() if fit.k else NOT_DRAFTED)
    shown = ("fitted_steps", "tested_steps", "constants_s", "errors", "plain_error", "not_identified")
    return {
        "run": str(run.path),
        "rule": RULE,
        "calibration": {name: getattr(fit, name) for name in shown},
        "now": _now(run),
        "what_if": _what_if(spec, fit, basis),
        "plan": answer.to_dict(),
    }


def _typical(run: RunRecord, recipe: Data, spec: PlanSpec, fit: RunCalibration) -> PlanSpec:
    """The spec of the run's median step: its lengths first, then those of the steps most like it."""
    steps = records(run, recipe)
    middle = float(np.median([s.seconds["generation"] for s in steps]))
    nearest = sorted(steps, key=lambda s: abs(s.seconds["generation"] - middle))
    trained = [s.trained_tokens / s.scored_tokens for s in steps]
    values: dict[str, Any] = {
        "prompts": nearest[0].groups,
        "samples": max(1, len(nearest[0].tokens) // nearest[0].groups),
        "trace": tuple(float(t) for s in nearest for t in s.tokens),
        "prompt_tokens": max(1, round(float(np.mean([s.prompt_tokens for s in steps])))),
        "trained": float(np.mean(trained)),
        "lag": 0,
        "gpus": 1,
    }
    if acceptance := acceptance_of(run.rows):
        values["acceptance_lengths"] = acceptance
    return replace(spec, **values)


def _now(run: RunRecord) -> dict[str, float]:
    """Mean seconds per stage and step, and tokens per second, as measured."""
    seconds = {stage: float(np.mean([row[f"time/{stage}"] for row in run.rows])) for stage in STAGES}
    step_s = sum(seconds.values())
    tokens = float(np.mean([row["perf/gen_tokens"] for row in run.rows]))
    return {f"{stage}_s": value for stage, value in seconds.items()} | {
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
    }


def _what_if(spec: PlanSpec, fit: RunCalibration, basis: RecipePlan) -> list[dict[str, Any]]:
    """Other k, lag, batch and slots, each against the run as it was: all predicted by the calibrated machine."""
    now = _predicted(spec, fit.k, fit.machine, basis)["tokens_per_s"]
    readings = [replace(fit.machine, engine=engine) for engine in fit.engines.values()]

    def compared(change: str, other: PlanSpec, k: int, machines: Sequence[CostModel]) -> dict[str, Any]:
        """By the first machine; `low` and `high` bound the throughput over what the run does not identify."""
        found = [_predicted(other, k, machine, basis) for machine in machines]
        against = [answer["tokens_per_s"] / now for answer in found]
        bounds = {"against_now": against[0], "low": min(against), "high": max(against)}
        return {"change": change, **found[0], **bounds}

    rows = [compared(f"k = {k}", spec, k, [fit.machine, *readings]) for k in range(K_MAX + 1)]
    others = {
        "lag 1, generation on a second machine like this": replace(spec, gpus=2, lag=1),
        "half the prompts": replace(spec, prompts=max(1, spec.prompts // 2)),
        "twice the prompts": replace(spec, prompts=2 * spec.prompts),
        "half the slots": replace(spec, slots=max(1, spec.slots // 2)),
        "twice the slots": replace(spec, slots=2 * spec.slots),
        "twice prompts and slots": replace(spec, prompts=2 * spec.prompts, slots=2 * spec.slots),
    }
    return rows + [compared(change, other, fit.k, [fit.machine]) for change, other in others.items()]


def _predicted(spec: PlanSpec, k: int, machine: CostModel, basis: RecipePlan) -> dict[str, float]:
    steps = StepModel(spec, machine=machine, model=basis.model)
    split = steps.split(k)
    step_s = split.step.step_s
    tokens_per_s = float(steps.lengths.sum()) / step_s
    return {"generation_s": split.stages.generation_s, "step_s": step_s, "tokens_per_s": tokens_per_s}
