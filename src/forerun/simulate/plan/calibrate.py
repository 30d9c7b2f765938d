"""Constants from measurements: of serving engines, and of one's own engine as `forerun bench` measured it.

Conventions: seconds. Every fit says what its rows could not identify. Serving constants are fitted in two steps, engine
and model family first, then each (model, GPU, engine) group around them, and only on the rows that `ServingRow.fitted`
names; the result ships as `data/serving_constants.json`.
Left out: fitting the hardware table itself; one's own run (`run.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.decode import rate_for
from forerun.simulate.core.fitting import UNIDENTIFIED, map_fit, positive_least_squares
from forerun.simulate.core.operators import Numbers, Tuning
from forerun.simulate.validation.serving import SPLIT_RULE, ServingRow, predict_s

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
    data = json.loads((files("forerun.simulate.core") / "data" / "serving_constants.json").read_text())
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


Row = Mapping[str, Any]
PLAIN_METHODS = ("none", "plain")
NEEDED = ("method", "k", "batch", "context", "plain_step_s")
DRAFTING_NEEDED = ("round_s",)
PARTS_SLACK = 1.2  # parts are means over all rounds, the round a median over busy ones


@dataclass(frozen=True, slots=True)
class CostTable:
    """What `forerun bench` writes: seconds of plain steps and of rounds on one machine with one policy.

    Schema and meaning of the rows' fields: section "Cost table" of `docs/simulator.md`.
    """

    machine: Any
    versions: Any
    policy: Any
    rows: tuple[Row, ...]

    @property
    def methods(self) -> list[str]:
        """Drafting methods that were measured, in the order of the file."""
        return list(dict.fromkeys(str(row["method"]) for row in self.rows if row["k"] > 0))

    def of(self, method: str) -> list[Row]:
        """The rows of a method, and every plain row.

        Raises:
            UserError: the method was not measured.
        """
        if method not in self.methods and method not in PLAIN_METHODS:
            known = ", ".join(self.methods) or "plain decoding only"
            raise UserError(f"The cost table has no rows of {method!r}; it has {known}. Run the benchmark with it.")
        return [row for row in self.rows if row["k"] == 0 or row["method"] == method]

    def acceptance(self, method: str) -> dict[int, float]:
        """Acceptance length for each measured k, the mean over batches; below the first one from its positions.

        A position's rate is cumulative (all drafts up to it were accepted). Noise is held to what can be: a length does
        not fall with k, and grows by at most the chance that all drafts before were accepted.
        """
        rows = [row for row in self.of(method) if row["k"] > 0 and row.get("acceptance_length")]
        if not rows:
            return {}
        ks = sorted({int(row["k"]) for row in rows})
        measured = {k: float(np.mean([row["acceptance_length"] for row in rows if row["k"] == k])) for k in ks}
        positions = [row.get("acceptance_per_position") or [] for row in rows if row["k"] == ks[0]]
        for k in range(1, ks[0]):
            known = [1.0 + sum(rates[:k]) for rates in positions if len(rates) >= k]
            measured |= {k: float(np.mean(known))} if known else {}
        return _possible(measured)


def _possible(lengths: Mapping[int, float]) -> dict[int, float]:
    """Acceptance lengths by k, moved into what conditional rates between 0 and 1 can give."""
    found: dict[int, float] = {}
    before, alpha, reached = 0, 1.0, 1.0
    for k in sorted(lengths):
        gap = k - before
        gain = min(max(lengths[k] - alpha, 0.0), gap * reached)
        rate = rate_for(gap, 1.0 + gain / reached) if gain > 0 else 0.0
        before, alpha, reached = k, alpha + gain, reached * rate**gap
        found[k] = alpha
    return found


def read_cost_table(path: str | Path) -> CostTable:
    """Read the cost table that `forerun bench` wrote.

    Raises:
        UserError: no such file, not the schema, or a number that cannot be; the row is named.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the cost table {path}: {error}; forerun bench writes one.") from None
    held = data if isinstance(data, dict) else {}
    missing = [name for name in ("machine", "versions", "policy", "rows") if name not in held]
    if missing or not isinstance(held["rows"], list):
        lacks = f"it lacks {', '.join(missing)}" if missing else "its rows are no list"
        raise UserError(f"{path} is no cost table: {lacks}; forerun bench writes one.")
    for number, row in enumerate(data["rows"], 1):
        _check_row(row, f"Row {number} of {path}")
    return CostTable(data["machine"], data["versions"], data["policy"], tuple(data["rows"]))


def _check_row(row: Row, where: str) -> None:
    drafts = isinstance(row, Mapping) and bool(row.get("k"))
    for name in (*NEEDED, *(DRAFTING_NEEDED if drafts else ())):
        value = row.get(name) if isinstance(row, Mapping) else None
        if value is None or (name != "method" and not isinstance(value, int | float)):
            needs = ", ".join((*NEEDED, *DRAFTING_NEEDED))
            raise UserError(f"{where} has {name}={value!r}; it needs numbers in {needs}.")
    if min(row["batch"], row["plain_step_s"]) <= 0 or min(row["k"], row["context"]) < 0:
        raise UserError(
            f"{where} has batch {row['batch']}, plain_step_s {row['plain_step_s']}, k {row['k']} and context "
            f"{row['context']}; batch and seconds must be positive, the others not negative."
        )
    if drafts and row["round_s"] <= 0:
        raise UserError(f"{where} has round_s {row['round_s']}; it must be positive.")
    parts_s = (row.get("draft_s") or 0.0) + (row.get("verify_s") or 0.0)
    if drafts and parts_s > PARTS_SLACK * row["round_s"]:
        raise UserError(
            f"{where} has draft_s + verify_s = {parts_s:.4g} s in a round of {row['round_s']:.4g} s; they are parts of "
            "it."
        )


CONTEXT_SPAN = 1.5  # longest over shortest context from which the price of the cache can be told


def fit_engine(rows: Sequence[Row], cached_s: float = 0.0) -> FittedEngine:
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
        _check_row({"method": "", **given}, f"Benchmark row {number}")
    table = _columns(rows)
    batch, k, context, plain_s, round_s, draft_s = table.values()
    ones, drafted = np.ones_like(batch), k > 0
    if _same_context(context):
        step, sequence = positive_least_squares(np.stack([ones, batch], 1), plain_s - cached_s * batch * context)
        cached = cached_s
    else:
        step, sequence, cached = positive_least_squares(np.stack([ones, batch, batch * context], 1), plain_s)
    fixed = row = draft_fixed = draft_row = 0.0
    if drafted.any():
        columns = np.stack([k, k * batch], 1)[drafted]
        if (draft_s[drafted] > 0).all():
            draft_fixed, draft_row = positive_least_squares(columns, draft_s[drafted])
        extra_s = (round_s - draft_s - plain_s)[drafted]
        fixed, row = _verify_constants(batch[drafted], k[drafted], extra_s, round_s[drafted])
    a, b, c, d, e, f, g = map(float, (step, sequence, cached, fixed, row, draft_fixed, draft_row))
    engine = FittedEngine(a, b, c, d, e, f, g, prompt_token_s=b)  # a prompt's token is one more row of a pass
    error = float(np.median(np.abs(_off(engine, table))))
    return replace(engine, error=error, not_identified=_unidentified(table))


def _same_context(context: Floats) -> bool:
    return float(context.max()) < CONTEXT_SPAN * max(float(context.min()), 1.0)


def held_out_error(rows: Sequence[Row]) -> float:
    """90th percentile of the relative error on each batch size when the engine is fitted without it.

    With fewer than three batch sizes nothing can be held out: the error on the fitted rows, three times over.
    """
    batches = sorted({float(row["batch"]) for row in rows})
    if len(batches) < 3:
        return 3.0 * float(np.quantile(np.abs(_off(fit_engine(rows), _columns(rows))), 0.9))
    off = []
    for batch in batches:
        kept = [row for row in rows if row["batch"] != batch]
        off.append(_off(fit_engine(kept), _columns([row for row in rows if row["batch"] == batch])))
    return float(np.quantile(np.abs(np.concatenate(off)), 0.9))


def _columns(rows: Sequence[Row]) -> dict[str, Floats]:
    names = ("batch", "k", "context", "plain_step_s", "round_s", "draft_s")
    return {name: np.array([float(row.get(name) or 0.0) for row in rows]) for name in names}


def _off(engine: FittedEngine, table: Mapping[str, Floats]) -> Floats:
    """Relative errors of plain steps, and of rounds where a row drafts."""
    batch, k, context, plain_s, round_s, _ = table.values()
    drafted = k > 0
    plain = np.asarray(engine.plain_s(batch, context)) / plain_s - 1
    rounds = np.asarray(engine.round_s(batch, k, context))[drafted] / round_s[drafted] - 1
    return np.concatenate([plain, rounds])


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
