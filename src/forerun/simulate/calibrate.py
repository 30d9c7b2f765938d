"""Constants from measurements: of serving engines, of one's own engine, of one's own run.

Conventions: seconds inside, milliseconds where a benchmark's columns say so. Every fit says what its rows could not
identify. Serving constants are fitted in two steps, engine and model family first, then each (model, GPU, engine) group
around them, and only on the rows that `ServingRow.fitted` names; the result ships as `data/serving_constants.json`.
Left out: fitting the hardware table itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.fitting import UNIDENTIFIED, map_fit, positive_least_squares
from forerun.simulate.operators import Numbers, Tuning
from forerun.simulate.serving import SPLIT_RULE, ServingRow, predict_s

Floats = NDArray[np.float64]
NAMES = tuple(field.name for field in fields(Tuning))
# Prior spread of each constant, in logarithms: first for an engine and family, then for a group within it.
ENGINE_SPREAD = {
    "host_s": 0.7,
    "sequence_s": 1.0,
    "overhead": 0.5,
    "memory": 0.15,
    "cache": 0.3,
    "compute": 0.3,
    "link": 0.5,
    "experts": 0.4,
}
GROUP_SPREAD = {
    "host_s": 0.7,
    "sequence_s": 0.7,
    "overhead": 0.4,
    "memory": 0.1,
    "cache": 0.25,
    "compute": 0.25,
    "link": 0.4,
    "experts": 0.35,
}


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Constants of one engine or group, the rows behind them, and the constants that those rows did not identify."""

    tuning: Tuning
    rows: int
    not_identified: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServingConstants:
    """Fitted constants by (family, backend) and by (model, GPU, engine)."""

    engines: dict[tuple[str, ...], Calibrated]
    groups: dict[tuple[str, ...], Calibrated]

    def tuning(self, group: tuple[str, str, str], family: str) -> Tuning:
        """The most specific constants there are: the group's, its backend's for the family, or the defaults."""
        found = self.find(group, family)
        return found.tuning if found else Tuning()

    def find(self, group: tuple[str, str, str], family: str) -> Calibrated | None:
        """The entry that `tuning` takes; None where the backend was never measured on the family."""
        return self.groups.get(group) or self.engines.get((family, group[2].partition(" ")[0]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"rule": SPLIT_RULE, "engines": _listed(self.engines), "groups": _listed(self.groups)}


def _listed(table: Mapping[tuple[str, ...], Calibrated]) -> list[dict[str, Any]]:
    return [
        {"key": list(key), "rows": c.rows, "not_identified": list(c.not_identified)}
        | {name: float(f"{value:.4g}") for name, value in asdict(c.tuning).items()}
        for key, c in sorted(table.items())
    ]


@cache
def shipped_constants() -> ServingConstants:
    """The constants of the package, fitted once on half of 689 measured rows."""
    data = json.loads((files("forerun.simulate") / "data" / "serving_constants.json").read_text())
    return ServingConstants(_unlisted(data["engines"]), _unlisted(data["groups"]))


def _unlisted(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], Calibrated]:
    return {
        tuple(entry["key"]): Calibrated(
            Tuning(*(entry[name] for name in NAMES)), entry["rows"], tuple(entry["not_identified"])
        )
        for entry in entries
    }


def fit_serving(rows: Sequence[ServingRow]) -> ServingConstants:
    """Fit all constants on the rows whose `fitted` holds; the others are dropped before anything is computed."""
    chosen = [row for row in rows if row.fitted]
    engines: dict[tuple[str, ...], Calibrated] = {}
    groups: dict[tuple[str, ...], Calibrated] = {}
    for key, members in _grouped(chosen, lambda row: (row.family, row.engine.split()[0])).items():
        engines[key] = _fit_tuning(members, Tuning(), ENGINE_SPREAD)
    for key, members in _grouped(chosen, lambda row: row.group).items():
        prior = engines[members[0].family, members[0].engine.split()[0]].tuning
        groups[key] = _fit_tuning(members, prior, GROUP_SPREAD)
    return ServingConstants(engines, groups)


def _grouped(rows: Sequence[ServingRow], key_of: Any) -> dict[tuple[str, ...], list[ServingRow]]:
    grouped: dict[tuple[str, ...], list[ServingRow]] = {}
    for row in rows:
        grouped.setdefault(key_of(row), []).append(row)
    return grouped


def _fit_tuning(rows: Sequence[ServingRow], prior: Tuning, spread: Mapping[str, float]) -> Calibrated:
    measured = np.array([row.measured_s for row in rows])
    centre = np.array([getattr(prior, name) for name in NAMES])
    fit = map_fit(lambda x: predict_s(rows, Tuning(*x)), measured, centre, np.array([spread[name] for name in NAMES]))
    vague = tuple(name for name, left in zip(NAMES, fit.spread_left, strict=True) if left > UNIDENTIFIED)
    return Calibrated(Tuning(*(float(value) for value in fit.values)), len(rows), vague)


BENCH_FIELDS = ("batch", "k", "context", "plain_ms", "round_ms", "draft_ms", "acceptance")


@dataclass(frozen=True, slots=True)
class FittedEngine:
    """An engine as a benchmark saw it; implements `Costs`.

    plain = step + sequence B + cached B S; round = plain + verify_fixed + row B k + draft_fixed k + draft_row B k.
    """

    step_s: float
    sequence_s: float
    cached_s: float  # per sequence and token of context
    verify_fixed_s: float
    row_s: float  # per sequence and draft token, verification
    draft_fixed_s: float  # per draft token
    draft_row_s: float  # per sequence and draft token
    prompt_token_s: float = 0.0
    capacity_tokens: float = float("inf")
    error: float = 0.0  # median relative error on the rows it was fitted to
    not_identified: tuple[str, ...] = ()

    def plain_s(self, batch: Numbers, context: Numbers) -> Numbers:
        """Seconds of one plain decode step."""
        return self.step_s + batch * (self.sequence_s + self.cached_s * context)

    def draft_s(self, batch: Numbers, k: Numbers) -> Numbers:
        """Seconds of drafting in one round."""
        return k * (self.draft_fixed_s + self.draft_row_s * batch)

    def round_s(self, batch: Numbers, k: Numbers, context: Numbers) -> Numbers:
        """Seconds of one round; with k = 0 a plain step."""
        extra_s = np.where(np.asarray(k) > 0, self.verify_fixed_s, 0.0) + k * batch * self.row_s
        return self.plain_s(batch, context) + extra_s + self.draft_s(batch, k)

    def prompt_s(self, tokens: Numbers) -> Numbers:
        """Seconds that one prompt occupies the engine."""
        return tokens * self.prompt_token_s

    def room_tokens(self) -> float:
        """Tokens of cache."""
        return self.capacity_tokens


def fit_engine(rows: Sequence[Mapping[str, float]], prompt_token_s: float = 0.0) -> FittedEngine:
    """Fit an engine from benchmark rows.

    Args:
        rows: mappings with `batch`, `k`, `context` (tokens cached on average), `plain_ms` (a plain step at that batch),
            `round_ms` (a round), `draft_ms` (its drafting, all k tokens), `acceptance` (α, not used for times).
            Rows with k = 0 need `plain_ms` only.
        prompt_token_s: seconds per prompt token, where known.

    Raises:
        UserError: no rows, a missing field, or a time that is not positive.
    """
    table = _bench_table(rows)
    batch, k, context = table["batch"], table["k"], table["context"]
    plain_s, round_s, draft_s = (table[name] / 1e3 for name in ("plain_ms", "round_ms", "draft_ms"))
    ones = np.ones_like(batch)
    step, sequence, cached = positive_least_squares(np.stack([ones, batch, batch * context], 1), plain_s)
    drafted = k > 0
    fixed = row = draft_fixed = draft_row = 0.0
    if drafted.any():
        columns = np.stack([k, k * batch], 1)[drafted]
        if (draft_s[drafted] > 0).all():
            draft_fixed, draft_row = positive_least_squares(columns, draft_s[drafted])
        fixed, row = _verify_constants(
            batch[drafted], k[drafted], (round_s - draft_s - plain_s)[drafted], round_s[drafted]
        )
    engine = FittedEngine(step, sequence, cached, fixed, row, draft_fixed, draft_row, prompt_token_s)
    predicted = np.where(drafted, engine.round_s(batch, k, context), engine.plain_s(batch, context))
    error = float(np.median(np.abs(predicted / np.where(drafted, round_s, plain_s) - 1)))
    values = {name: float(value) for name, value in asdict(engine).items() if name.endswith("_s")}
    return FittedEngine(**values, error=error, not_identified=_unidentified(table))


def _bench_table(rows: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    if not rows:
        raise UserError("There are no benchmark rows to fit an engine to; run the benchmark first.")
    table = {}
    for name in BENCH_FIELDS[:-1]:
        default = 0.0 if name in ("round_ms", "draft_ms", "k") else None
        if default is None and any(name not in row for row in rows):
            raise UserError(f"A benchmark row lacks {name!r}; it needs {', '.join(BENCH_FIELDS)}.")
        table[name] = np.array([float(row.get(name) or 0.0) for row in rows])
    drafted = table["k"] > 0
    if (table["plain_ms"] <= 0).any() or (table["round_ms"][drafted] <= 0).any():
        raise UserError("A benchmark row has a plain_ms or round_ms that is not positive; measure it again.")
    return table


def _verify_constants(batch: Floats, k: Floats, extra_s: Floats, round_s: Floats) -> tuple[float, float]:
    """What verification adds to a plain step: fixed seconds, and seconds per draft token and sequence."""
    columns, weight = np.stack([np.ones_like(k), k * batch], 1), 1 / round_s
    best, best_error = (0.0, 0.0), np.inf
    for use in ([0, 1], [0], [1], []):
        candidate = np.zeros(2)
        if use:
            candidate[use] = np.linalg.lstsq(columns[:, use] * weight[:, None], extra_s * weight, rcond=None)[0]
        error = float((((columns @ candidate - extra_s) * weight) ** 2).sum())
        if (candidate >= 0).all() and error < best_error:
            best, best_error = (float(candidate[0]), float(candidate[1])), error
    return best


def _unidentified(table: Mapping[str, Floats]) -> tuple[str, ...]:
    """Sentences on what the rows cannot tell apart."""
    drafted = table["k"] > 0
    says = {
        "batch": "step_s and sequence_s: all rows have the same batch",
        "context": "cached_s: all rows have the same context",
    }
    found = [text for name, text in says.items() if len(np.unique(table[name])) < 2]
    if not drafted.any():
        found.append("verify_fixed_s, row_s, draft_fixed_s, draft_row_s: no row drafts")
    elif len(np.unique(table["k"][drafted])) < 2:
        found.append("verify_fixed_s and row_s: all drafting rows have the same k")
    if drafted.any() and not (table["draft_ms"][drafted] > 0).all():
        found.append("draft_fixed_s and draft_row_s: draft_ms is missing, drafting is part of row_s")
    return tuple(found)


STAGES = ("data", "prepare", "generation", "logprob", "train")


@dataclass(frozen=True, slots=True)
class RunFit:
    """Stage times of a run as lines: seconds = fixed + slope x work.

    Work is the output tokens of the step for logprob and train, rounds (tokens / α) for generation, nothing for data
    and prepare. `errors` are relative, on the steps that were not fitted.
    """

    fixed_s: dict[str, float]
    slope_s: dict[str, float]
    fitted_steps: tuple[int, ...]
    errors: dict[str, dict[str, float]]

    def predict_s(self, tokens: float, acceptance: float = 1.0) -> dict[str, float]:
        """Stage seconds of a step with `tokens` output tokens at acceptance length `acceptance`."""
        work = _stage_work(np.array([tokens]), np.array([acceptance]))
        return {stage: self.fixed_s[stage] + self.slope_s[stage] * float(work[stage][0]) for stage in STAGES}


def _stage_work(tokens: Floats, acceptance: Floats) -> dict[str, Floats]:
    none = np.zeros_like(tokens)
    return {"data": none, "prepare": none, "generation": tokens / acceptance, "logprob": tokens, "train": tokens}


def fit_run(steps: Sequence[Mapping[str, float]]) -> RunFit:
    """Fit a run's stages on its even steps and measure the error on the odd ones.

    Args:
        steps: mappings with `<stage>_s` for the five stages, `tokens` (output tokens) and `acceptance` (α, 1 = plain).

    Raises:
        UserError: fewer than four steps, or a missing field.
    """
    if len(steps) < 4:
        raise UserError(
            f"The run has {len(steps)} steps; calibrating on half and testing on the rest needs 4 at least."
        )
    needed = ["tokens", *(f"{stage}_s" for stage in STAGES)]
    missing = sorted({name for step in steps for name in needed if name not in step})
    if missing:
        raise UserError(f"The run's metrics lack {', '.join(missing)}; each step needs {', '.join(needed)}.")
    tokens = np.array([float(step["tokens"]) for step in steps])
    acceptance = np.array([float(step.get("acceptance", 1.0)) for step in steps])
    work, even = _stage_work(tokens, acceptance), np.arange(len(steps)) % 2 == 0
    fixed, slope, error = {}, {}, {}
    for stage in STAGES:
        seconds = np.maximum([float(step[f"{stage}_s"]) for step in steps], 1e-6)
        columns = np.stack([np.ones_like(tokens), work[stage]], 1)
        fixed[stage], slope[stage] = map(float, positive_least_squares(columns[even], seconds[even]))
        off = np.abs((columns @ [fixed[stage], slope[stage]])[~even] / seconds[~even] - 1)
        error[stage] = {"median": float(np.median(off)), "worst": float(off.max())}
    return RunFit(fixed, slope, tuple(int(i) for i in np.flatnonzero(even)), error)
