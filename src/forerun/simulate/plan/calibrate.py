"""A machine's `CostModel` from measurements on it: a cost table of `forerun bench`, or the steps of a finished run.

Both fit a `LinearEngine` and name what the measurements do not identify: a cost table by non-negative least squares, a
run around the nominal values, on its odd steps, and tested on the even ones. Seconds; a *pass* is one forward of all
running sequences, a *row* one sequence in it. Not supported: asynchronous runs whose stages overlap on one machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.cost_model import CostModel, LearnerWork
from forerun.simulate.core.decode import DecodeWork, LinearEngine
from forerun.simulate.core.fitting import map_fit, nonnegative_least_squares, relative_errors
from forerun.simulate.core.rollout import simulate_rollout
from forerun.simulate.plan.cost_table import CostTable, Row, check_row
from forerun.types import STAGES

Floats = NDArray[np.float64]
Data = Mapping[str, Any]

CONTEXT_SPAN = 1.5  # longest over shortest context from which the price of the cache is identified
RULE = "fitted on the odd steps (1, 3, 5, ...), tested on the even ones"
STEPS_NEEDED = 4
PRIOR_SPREAD = 1.0  # of each constant around its nominal value, in logarithms: a factor of 2.7
NOISE = 0.1  # scatter of a step's seconds on a machine that runs other programs too
PASS_COUNTER = LinearEngine(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def benchmarked_cost_model(nominal: CostModel, table: CostTable, method: str) -> CostModel:
    """The nominal model with the measured engine of a method. Raises UserError without rows of the method."""
    rows = table.of(method)
    engine = replace(fit_engine(rows, nominal.engine.cached_s), capacity_tokens=nominal.engine.capacity_tokens)
    error = held_out_error(rows)
    vague = f" Not identified: {'; '.join(engine.not_identified)}." if engine.not_identified else ""
    return replace(
        nominal,
        engine=engine,
        engine_band=error,
        cost_band=error,
        origin=f"The engine's costs come from {len(rows)} rows of a cost table, off by {error:.0%} on batch sizes that "
        f"were held out; the learner's are nominal, within a factor of {1 + nominal.band:.0f}.{vague}",
    )


def fit_engine(rows: Sequence[Row], cached_s: float = 0.0) -> LinearEngine:
    """Fit an engine to cost-table rows of one method.

    Args:
        rows: mappings with `k`, `batch`, `context` (tokens cached on average), `plain_step_s` (a plain step at that
            batch), and where k > 0 `round_s` (a round) and, where known, `draft_s` (the drafting in it, all k tokens).
        cached_s: seconds per sequence and cached token where all rows have nearly the same context.

    Raises:
        UserError: no rows, a missing field, or a time that is not positive.
    """
    if not rows:
        raise UserError("There are no benchmark rows to fit an engine to; run forerun bench first.")
    for number, given in enumerate(rows, 1):
        check_row({"method": "", **given}, f"Benchmark row {number}")
    table = _columns(rows)
    batch, context, plain_s = table["batch"], table["context"], table["plain_step_s"]
    columns = np.stack([np.ones_like(batch), batch, batch * context], 1)
    if _same_context(context):
        step_s, sequence_s = nonnegative_least_squares(columns[:, :2], plain_s - cached_s * columns[:, 2])
    else:
        step_s, sequence_s, cached_s = nonnegative_least_squares(columns, plain_s)
    engine = LinearEngine(
        float(step_s),
        float(sequence_s),
        float(cached_s),
        *_round_constants({name: values[table["k"] > 0] for name, values in table.items()}),
        prompt_token_s=float(sequence_s),  # a prompt's token is one more row of a pass
    )
    error = float(np.median(np.abs(_engine_errors(engine, table))))
    return replace(engine, error=error, not_identified=_unidentified(table))


def _round_constants(drafted: Mapping[str, Floats]) -> tuple[float, float, float, float]:
    """`verify_fixed_s`, `row_s`, `draft_fixed_s` and `draft_row_s` from the drafting rows; 0 without any."""
    k, rows, draft_s, round_s = drafted["k"], drafted["k"] * drafted["batch"], drafted["draft_s"], drafted["round_s"]
    if not k.size:
        return 0.0, 0.0, 0.0, 0.0
    draft_fixed_s = draft_row_s = 0.0
    if (draft_s > 0).all():
        draft_fixed_s, draft_row_s = nonnegative_least_squares(np.stack([k, rows], 1), draft_s)
    added_s = round_s - draft_s - drafted["plain_step_s"]
    fixed_s, row_s = nonnegative_least_squares(np.stack([np.ones_like(k), rows], 1), added_s, round_s)
    return float(fixed_s), float(row_s), float(draft_fixed_s), float(draft_row_s)


def _same_context(context: Floats) -> bool:
    return float(context.max()) < CONTEXT_SPAN * max(float(context.min()), 1.0)


def held_out_error(rows: Sequence[Row]) -> float:
    """90th percentile of the relative error on each batch size when the engine is fitted without it.

    With fewer than three batch sizes nothing can be held out: three times the error on the fitted rows.
    """
    batches = sorted({float(row["batch"]) for row in rows})
    if len(batches) < 3:
        return 3.0 * float(np.quantile(np.abs(_engine_errors(fit_engine(rows), _columns(rows))), 0.9))
    errors = []
    for batch in batches:
        engine = fit_engine([row for row in rows if row["batch"] != batch])
        errors.append(_engine_errors(engine, _columns([row for row in rows if row["batch"] == batch])))
    return float(np.quantile(np.abs(np.concatenate(errors)), 0.9))


def _columns(rows: Sequence[Row]) -> dict[str, Floats]:
    names = ("batch", "k", "context", "plain_step_s", "round_s", "draft_s")
    return {name: np.array([float(row.get(name) or 0.0) for row in rows]) for name in names}


def _engine_errors(engine: LinearEngine, table: Mapping[str, Floats]) -> Floats:
    """Relative errors of plain steps, and of rounds where a row drafts."""
    batch, k, context = table["batch"], table["k"], table["context"]
    drafted = k > 0
    plain = np.asarray(engine.plain_s(batch, context)) / table["plain_step_s"] - 1
    rounds = np.asarray(engine.round_s(batch, k, context))[drafted] / table["round_s"][drafted] - 1
    return np.concatenate([plain, rounds])


def _unidentified(table: Mapping[str, Floats]) -> tuple[str, ...]:
    """Sentences on the constants that the rows do not identify."""
    drafted = table["k"] > 0
    found = []
    if len(np.unique(table["batch"])) < 2:
        found.append("step_s and sequence_s: all rows have the same batch")
    if _same_context(table["context"]):
        found.append("cached_s: all rows have about the same context")
    if not drafted.any():
        found.append("verify_fixed_s, row_s, draft_fixed_s, draft_row_s: no row drafts")
    elif len(np.unique(table["k"][drafted])) < 2:
        found.append("verify_fixed_s and row_s: all drafting rows have the same k")
    if drafted.any() and not (table["draft_s"][drafted] > 0).all():
        found.append("draft_fixed_s and draft_row_s: draft_s is missing, drafting is part of row_s")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of a run. The arrays have one entry per rollout, in the order of admission."""

    step: int
    seconds: dict[str, float]  # of the five stages; generation without the reward functions, train without the drafter
    reward_s: float
    drafter_s: float
    tokens: Floats  # generated
    rounds: Floats  # passes that each rollout took part in
    trained_tokens: float  # prompt and answer tokens of the rollouts with a gradient
    prompt_tokens: float  # mean
    groups: int  # prompts
    drafted: bool
    compare_s: float | None  # the same prompts, generated plainly
    compare_tokens: float

    @property
    def scored_tokens(self) -> float:
        """Prompt and answer tokens of all rollouts."""
        return float(self.tokens.sum()) + len(self.tokens) * self.prompt_tokens


@dataclass(frozen=True, slots=True)
class RunCalibration:
    """A machine calibrated on a run, and its errors on the steps that were not fitted."""

    machine: CostModel
    k: int
    fitted_steps: tuple[int, ...]
    tested_steps: tuple[int, ...]
    errors: dict[str, dict[str, float]]  # per stage and for "step"
    plain_error: dict[str, float]  # of the plain generation that was compared; {} without
    constants_s: dict[str, float]
    not_identified: tuple[str, ...]
    engines: dict[str, LinearEngine] = field(default_factory=dict)  # readings for other k: "per round", "per draft"


def calibrate(steps: Sequence[StepRecord], nominal: CostModel, k: int, slots: int, work: LearnerWork) -> RunCalibration:
    """Fit a machine on half of a run's steps and judge it on the other half.

    Args:
        steps: at least four.
        nominal: the machine that the constants are fitted around.
        k: draft tokens per round of the run, 0 for a plain one.
        work: passes and updates of a step; its tokens are those of the steps.

    Raises:
        UserError: fewer than four steps.
    """
    if len(steps) < STEPS_NEEDED:
        raise UserError(
            f"The run has {len(steps)} finished steps; calibrating on half and testing on the rest needs "
            f"{STEPS_NEEDED} at least."
        )
    fitted, tested = [s for s in steps if s.step % 2], [s for s in steps if s.step % 2 == 0]
    if not fitted or not tested:
        raise UserError(
            f"All {len(steps)} steps of the run are {'odd' if fitted else 'even'}: nothing would be tested."
        )
    engine, vague = _fit_generation(fitted, nominal.engine, k, slots)
    learner, learner_vague = _fit_learner(fitted, nominal, work)
    machine = replace(learner, engine=engine)
    errors = _errors(tested, machine, k, slots, work)
    plain = [(engine.generation_s(plain_decode_work(s, slots), 0), s.compare_s) for s in tested if s.compare_s]
    plain_error = summary(plain) if plain else {}
    machine = _with_bands(machine, errors, plain_error, len(fitted), len(tested))
    return RunCalibration(
        machine=machine,
        k=k,
        fitted_steps=tuple(s.step for s in fitted),
        tested_steps=tuple(s.step for s in tested),
        errors=errors,
        plain_error=plain_error,
        constants_s=_constants_s(machine, k),
        not_identified=(*vague, *learner_vague),
        engines=_readings(engine, k),
    )


def decode_work(rounds: Floats, tokens: Floats, step: StepRecord, slots: int) -> DecodeWork:
    """Work of a generation whose rollouts take `rounds` passes each, `slots` of them at once."""
    passes = simulate_rollout(PASS_COUNTER, rounds, replicas=1, prompt_tokens=0.0, slots=slots).seconds
    context = float(np.average(step.prompt_tokens + tokens / 2, weights=rounds))
    return DecodeWork(passes, float(rounds.sum()) / passes, context, step.groups * step.prompt_tokens)


def plain_decode_work(step: StepRecord, slots: int) -> DecodeWork:
    """Work of the plain generation of the same prompts: the step's lengths, scaled to the tokens that it made."""
    tokens = np.maximum(step.tokens * step.compare_tokens / step.tokens.sum(), 1.0)
    return decode_work(tokens, tokens, step, slots)


def _fit_generation(
    steps: Sequence[StepRecord], nominal: LinearEngine, k: int, slots: int
) -> tuple[LinearEngine, tuple[str, ...]]:
    """Four factors on the nominal engine: pass and row of plain decoding, added seconds of a round per pass and row."""
    runs = [(decode_work(s.rounds, s.tokens, s, slots), k if s.drafted else 0, s.seconds["generation"]) for s in steps]
    runs += [(plain_decode_work(s, slots), 0, s.compare_s) for s in steps if s.compare_s is not None]
    count = 4 if k else 2

    def predict(factors: Floats) -> Floats:
        engine = _scaled(nominal, factors)
        return np.array([engine.generation_s(work, drafts) for work, drafts, _ in runs])

    measured = np.array([seconds for *_, seconds in runs])
    fit = map_fit(predict, measured, np.ones(count), np.full(count, PRIOR_SPREAD), NOISE)
    names = ("seconds per pass", "seconds per row", "what a round adds per pass", "what a round adds per row")
    return _scaled(nominal, fit.values), fit.unidentified(names[:count])


def _scaled(engine: LinearEngine, factors: Floats) -> LinearEngine:
    per_pass, per_row, round_pass, round_row = map(float, (*factors, 1.0, 1.0)[:4])
    return replace(
        engine,
        step_s=engine.step_s * per_pass,
        sequence_s=engine.sequence_s * per_row,
        prompt_token_s=engine.prompt_token_s * per_row,
        verify_fixed_s=engine.verify_fixed_s * round_pass,
        draft_fixed_s=engine.draft_fixed_s * round_pass,
        row_s=engine.row_s * round_row,
        draft_row_s=engine.draft_row_s * round_row,
    )


def _readings(engine: LinearEngine, k: int) -> dict[str, LinearEngine]:
    """One k does not identify which part of a round grows with k: all that a pass adds, or none of it."""
    if not k:
        return {}
    added_s = engine.verify_fixed_s + k * engine.draft_fixed_s
    return {
        "per round": replace(engine, verify_fixed_s=added_s, draft_fixed_s=0.0),
        "per draft": replace(engine, verify_fixed_s=0.0, draft_fixed_s=added_s / k),
    }


def _fit_learner(
    steps: Sequence[StepRecord], nominal: CostModel, work: LearnerWork
) -> tuple[CostModel, tuple[str, ...]]:
    """Medians of the simple stages; seconds per trained token and per update around the nominal ones."""
    found = replace(
        nominal,
        score_token_s=_median([s.seconds["logprob"] / (s.scored_tokens * work.score_passes) for s in steps]),
        prepare_s=_median([s.seconds["prepare"] for s in steps]),
        data_s=_median([s.seconds["data"] for s in steps]),
        reward_s=_median([s.reward_s for s in steps]),
        drafter_s=_median([s.drafter_s for s in steps]),
    )
    trained = [s for s in steps if s.trained_tokens > 0]
    if not trained:
        return found, ("seconds per trained token: no fitted step had a gradient",)
    tokens = np.array([s.trained_tokens for s in trained]) * work.train_passes / 3.0
    seconds = np.array([s.seconds["train"] for s in trained])
    prior = np.array([nominal.train_token_s, nominal.update_s])
    fit = map_fit(lambda x: tokens * x[0] + work.updates * x[1], seconds, prior, np.full(2, PRIOR_SPREAD), NOISE)
    train_token_s, update_s = map(float, fit.values)
    vague = fit.unidentified(("seconds per trained token", "seconds per update"))
    return replace(found, train_token_s=train_token_s, update_s=update_s), vague


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _errors(
    steps: Sequence[StepRecord], machine: CostModel, k: int, slots: int, work: LearnerWork
) -> dict[str, dict[str, float]]:
    """Relative errors on steps that were not fitted, per stage and for the step."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*STAGES, "step")}
    for s in steps:
        ours = predict_step(s, machine, k, slots, work)
        measured = s.seconds | {"generation": s.seconds["generation"] + s.reward_s}
        measured["train"] += s.drafter_s
        for name, seconds in ours.items():
            if name != "train" or s.trained_tokens > 0 or s.drafter_s > 0:
                pairs[name].append((seconds, measured[name]))
        pairs["step"].append((sum(ours.values()), sum(measured.values())))
    return {name: summary(found) for name, found in pairs.items()}


def predict_step(s: StepRecord, machine: CostModel, k: int, slots: int, work: LearnerWork) -> dict[str, float]:
    """Seconds by stage of a step whose lengths and rounds are known."""
    generation_s = machine.engine.generation_s(decode_work(s.rounds, s.tokens, s, slots), k if s.drafted else 0)
    own = replace(work, tokens=s.scored_tokens, trained=s.trained_tokens / s.scored_tokens)
    stages = machine.stages(own, generation_s)
    return {name: getattr(stages, f"{name}_s") for name in STAGES}


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Relative errors of (predicted, measured): count, median, worst, and that of the sums; zeros do not count."""
    kept = np.array([pair for pair in pairs if pair[1] > 0])
    if not kept.size:
        return {"steps": 0.0}
    ours, measured = kept.T
    found = relative_errors(ours, measured)
    total = float(ours.sum() / measured.sum() - 1)
    return {"steps": float(len(kept)), "median": found["median"], "worst": found["worst"], "total": total}


def _with_bands(
    machine: CostModel, errors: Mapping[str, Data], plain_error: Data, fitted: int, tested: int
) -> CostModel:
    """Bands from the worst errors on tested steps; a stage without a tested step keeps its nominal band."""
    learner = [errors[name].get("worst", machine.band) for name in ("logprob", "train")]
    engine = errors["generation"]["worst"]
    cost = ((1 + engine) * (1 + plain_error["worst"]) - 1) if plain_error else machine.cost_band
    origin = (
        f"This machine's constants come from {fitted} steps of the run; on the {tested} others the step was off by "
        f"{errors['step']['median']:.0%} (median) and {errors['step']['worst']:.0%} (worst)."
    )
    return replace(machine, band=max(learner), engine_band=engine, cost_band=cost, origin=origin)


def _constants_s(machine: CostModel, k: int) -> dict[str, float]:
    """The constants by the names that the text prints."""
    engine = machine.engine
    found = {"plain pass": engine.step_s, "plain row": engine.sequence_s}
    if k:
        found |= {
            "round, added per pass": engine.verify_fixed_s + k * engine.draft_fixed_s,
            "round, added per row": k * (engine.row_s + engine.draft_row_s),
        }
    return found | {
        "scored token": machine.score_token_s,
        "trained token": machine.train_token_s,
        "update": machine.update_s,
        "prepare": machine.prepare_s,
        "rewards": machine.reward_s,
        "drafter's training": machine.drafter_s,
    }
