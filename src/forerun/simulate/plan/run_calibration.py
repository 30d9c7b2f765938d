"""Constants of one machine from the steps of a run on it: seconds per pass, per row, per scored and per trained token.

Conventions: seconds; a *pass* is one forward of all live sequences, a *row* one sequence in it. Fitted on the odd steps
(1, 3, 5, ...), judged on the even ones, which the fit never sees. Every constant is fitted around its nominal value, so
that one which the run cannot tell stays there and is named. Left out: asynchronous runs whose stages overlap on one
machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.decode import constant_acceptance, fixed_budget
from forerun.simulate.core.fitting import UNIDENTIFIED, map_fit
from forerun.simulate.core.machine import Machine
from forerun.simulate.core.rollout import simulate_rollout
from forerun.simulate.plan.calibrate import FittedEngine

Floats = NDArray[np.float64]
Data = Mapping[str, Any]

RULE = "fitted on the odd steps (1, 3, 5, ...), tested on the even ones"
STEPS_NEEDED = 4
PRIOR_SPREAD = 1.0  # of each constant around its nominal value, in logarithms: a factor of 2.7
NOISE = 0.1  # scatter of a step's seconds on a machine that does other things too
PASS_COUNTER = FittedEngine(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


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
class Decoding:
    """What one generation did: columns of the linear model of its seconds."""

    passes: float
    rows: float
    cached: float  # rows times their context
    prompt_tokens: float


@dataclass(frozen=True, slots=True)
class RunFit:
    """A calibrated machine, and how wrong it is on the steps that were not fitted."""

    machine: Machine
    k: int
    fitted_steps: tuple[int, ...]
    tested_steps: tuple[int, ...]
    errors: dict[str, dict[str, float]]  # per stage and for "step"
    plain_error: dict[str, float]  # of the plain generation beside; {} without
    constants: dict[str, float]
    not_identified: tuple[str, ...]
    engines: dict[str, FittedEngine] = field(default_factory=dict)  # readings for other k: "per round", "per draft"


def calibrate(steps: Sequence[StepRecord], nominal: Machine, k: int, slots: int, work: Data) -> RunFit:
    """Fit a machine on half of a run's steps and judge it on the other half.

    Args:
        steps: at least four.
        nominal: the machine that the constants are fitted around.
        k: draft tokens per round of the run, 0 for a plain one.
        work: `score_passes`, `train_passes` and `updates` of a step, as in `machine.Work`.

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
    engine, vague = _fit_engine(fitted, nominal.engine, k, slots)
    learner, learner_vague = _fit_learner(fitted, nominal, work)
    machine = replace(
        learner,
        engine=engine,
        prepare_s=_median(fitted, "prepare"),
        data_s=_median(fitted, "data"),
        reward_s=float(np.median([s.reward_s for s in fitted])),
        drafter_s=float(np.median([s.drafter_s for s in fitted])),
    )
    errors = _errors(tested, machine, k, slots, work)
    plain_error = _plain_errors(tested, machine.engine, slots)
    machine = _with_bands(machine, errors, plain_error, len(fitted), len(tested))
    return RunFit(
        machine=machine,
        k=k,
        fitted_steps=tuple(s.step for s in fitted),
        tested_steps=tuple(s.step for s in tested),
        errors=errors,
        plain_error=plain_error,
        constants=_constants(machine, k),
        not_identified=(*vague, *learner_vague),
        engines=_readings(engine, k),
    )


def _median(steps: Sequence[StepRecord], stage: str) -> float:
    return float(np.median([s.seconds[stage] for s in steps]))


def decoding(rounds: Floats, tokens: Floats, step: StepRecord, slots: int) -> Decoding:
    """Passes and rows of a generation whose rollouts take `rounds` passes each, `slots` of them side by side."""
    drained = simulate_rollout(
        PASS_COUNTER, rounds, replicas=1, budget=fixed_budget(0), acceptance=constant_acceptance(0.0),
        prompt_tokens=0.0, slots=slots,
    )  # fmt: skip
    cached = float((rounds * (step.prompt_tokens + tokens / 2)).sum())
    return Decoding(drained.seconds, float(rounds.sum()), cached, step.groups * step.prompt_tokens)


def plain_decoding(step: StepRecord, slots: int) -> Decoding:
    """The plain generation of the same prompts: the step's lengths, scaled to the tokens that it made."""
    tokens = np.maximum(step.tokens * step.compare_tokens / step.tokens.sum(), 1.0)
    return decoding(tokens, tokens, step, slots)


def generation_s(engine: FittedEngine, work: Decoding, k: int) -> float:
    """Seconds of a generation: the drain of `FittedEngine`'s costs, which are linear in passes and rows."""
    plain_s = work.passes * engine.step_s + work.rows * engine.sequence_s + work.cached * engine.cached_s
    prompt_s = work.prompt_tokens * engine.prompt_token_s
    if not k:
        return plain_s + prompt_s
    per_pass = engine.verify_fixed_s + k * engine.draft_fixed_s
    return plain_s + prompt_s + work.passes * per_pass + work.rows * k * (engine.row_s + engine.draft_row_s)


def _fit_engine(
    steps: Sequence[StepRecord], nominal: FittedEngine, k: int, slots: int
) -> tuple[FittedEngine, tuple[str, ...]]:
    """Four factors on the nominal engine: pass and row of plain decoding, what a round adds per pass and per row."""
    runs = [(decoding(s.rounds, s.tokens, s, slots), k if s.drafted else 0, s.seconds["generation"]) for s in steps]
    runs += [(plain_decoding(s, slots), 0, s.compare_s) for s in steps if s.compare_s is not None]
    count = 4 if k else 2

    def predict(x: Floats) -> Floats:
        engine = _scaled(nominal, x)
        return np.array([generation_s(engine, work, drafts) for work, drafts, _ in runs])

    measured = np.array([seconds for *_, seconds in runs])
    fit = map_fit(predict, measured, np.ones(count), np.full(count, PRIOR_SPREAD), NOISE)
    names = ("seconds per pass", "seconds per row", "what a round adds per pass", "what a round adds per row")
    vague = tuple(name for name, left in zip(names, fit.spread_left, strict=False) if left > UNIDENTIFIED)
    return _scaled(nominal, fit.values), vague


def _scaled(engine: FittedEngine, factors: Floats) -> FittedEngine:
    per_pass, per_row = float(factors[0]), float(factors[1])
    scaled = replace(
        engine,
        step_s=engine.step_s * per_pass,
        sequence_s=engine.sequence_s * per_row,
        prompt_token_s=engine.prompt_token_s * per_row,
    )
    if len(factors) == 2:
        return scaled
    round_pass, round_row = float(factors[2]), float(factors[3])
    return replace(
        scaled,
        verify_fixed_s=engine.verify_fixed_s * round_pass,
        draft_fixed_s=engine.draft_fixed_s * round_pass,
        row_s=engine.row_s * round_row,
        draft_row_s=engine.draft_row_s * round_row,
    )


def _readings(engine: FittedEngine, k: int) -> dict[str, FittedEngine]:
    """One k in the run leaves open which part of a round grows with k: all that a pass adds, or none of it."""
    if not k:
        return {}
    added_s = engine.verify_fixed_s + k * engine.draft_fixed_s
    return {
        "per round": replace(engine, verify_fixed_s=added_s, draft_fixed_s=0.0),
        "per draft": replace(engine, verify_fixed_s=0.0, draft_fixed_s=added_s / k),
    }


def _fit_learner(steps: Sequence[StepRecord], nominal: Machine, work: Data) -> tuple[Machine, tuple[str, ...]]:
    """Seconds per scored token (their median), per trained token and per update (around the nominal ones)."""
    scored = [s.seconds["logprob"] / (s.scored_tokens * work["score_passes"]) for s in steps]
    found = replace(nominal, score_token_s=float(np.median(scored)))
    trained = [s for s in steps if s.trained_tokens > 0]
    if not trained:
        return found, ("seconds per trained token: no fitted step had a gradient",)
    tokens = np.array([s.trained_tokens for s in trained]) * work["train_passes"] / 3.0
    seconds = np.array([s.seconds["train"] for s in trained])
    prior = np.array([nominal.train_token_s, nominal.update_s])
    fit = map_fit(lambda x: tokens * x[0] + work["updates"] * x[1], seconds, prior, np.full(2, PRIOR_SPREAD), NOISE)
    names = ("seconds per trained token", "seconds per update")
    vague = tuple(name for name, left in zip(names, fit.spread_left, strict=True) if left > UNIDENTIFIED)
    return replace(found, train_token_s=float(fit.values[0]), update_s=float(fit.values[1])), vague


def _errors(
    steps: Sequence[StepRecord], machine: Machine, k: int, slots: int, work: Data
) -> dict[str, dict[str, float]]:
    """Relative errors on steps that were not fitted, per stage and for the step."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("data", "prepare", "generation", "logprob")}
    pairs |= {"train": [], "step": []}
    for s in steps:
        ours = predict_step(s, machine, k, slots, work)
        measured = s.seconds | {"generation": s.seconds["generation"] + s.reward_s}
        measured["train"] += s.drafter_s
        for name, seconds in ours.items():
            if name != "train" or s.trained_tokens > 0 or s.drafter_s > 0:
                pairs[name].append((seconds, measured[name]))
        pairs["step"].append((sum(ours.values()), sum(measured.values())))
    return {name: summary(found) for name, found in pairs.items()}


def predict_step(s: StepRecord, machine: Machine, k: int, slots: int, work: Data) -> dict[str, float]:
    """Stage seconds of a step whose lengths and rounds are known."""
    generated = generation_s(machine.engine, decoding(s.rounds, s.tokens, s, slots), k if s.drafted else 0)
    tokens_s = s.trained_tokens * work["train_passes"] / 3.0 * machine.train_token_s
    return {
        "data": machine.data_s,
        "prepare": machine.prepare_s,
        "generation": generated + machine.reward_s,
        "logprob": s.scored_tokens * work["score_passes"] * machine.score_token_s,
        "train": (tokens_s + work["updates"] * machine.update_s if s.trained_tokens > 0 else 0.0) + machine.drafter_s,
    }


def _plain_errors(steps: Sequence[StepRecord], engine: FittedEngine, slots: int) -> dict[str, float]:
    pairs = [(generation_s(engine, plain_decoding(s, slots), 0), s.compare_s) for s in steps if s.compare_s is not None]
    return summary(pairs) if pairs else {}


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Count, median and worst size of the relative error, and the error of the sum; steps of no time are left out."""
    kept = [(ours, measured) for ours, measured in pairs if measured > 0]
    if not kept:
        return {"steps": 0.0}
    off = np.abs([ours / measured - 1 for ours, measured in kept])
    total = sum(ours for ours, _ in kept) / sum(measured for _, measured in kept) - 1
    return {"steps": float(len(kept)), "median": float(np.median(off)), "worst": float(off.max()), "total": total}


def _with_bands(machine: Machine, errors: Mapping[str, Data], plain_error: Data, fitted: int, tested: int) -> Machine:
    """Bands from the worst errors on tested steps; a stage without a tested step keeps its nominal band."""
    learner = [errors[name].get("worst", machine.band) for name in ("logprob", "train")]
    engine = errors["generation"]["worst"]
    cost = ((1 + engine) * (1 + plain_error["worst"]) - 1) if plain_error else machine.cost_band
    origin = (
        f"This machine's constants come from {fitted} steps of the run; on the {tested} others the step was off by "
        f"{errors['step']['median']:.0%} (median) and {errors['step']['worst']:.0%} (worst)."
    )
    return replace(machine, band=max(learner), engine_band=engine, cost_band=cost, origin=origin)


def _constants(machine: Machine, k: int) -> dict[str, float]:
    """The constants by the names that the text prints, in seconds."""
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
