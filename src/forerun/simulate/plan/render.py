"""The planner's results as plain text: one string per result, tables as everywhere in Forerun's console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forerun.report.format import percent, seconds, times
from forerun.report.tables import as_text, table

Data = Mapping[str, Any]
WIDTH = 140


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose numeric columns are right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [i for i in range(len(columns)) if not any(letter.isalpha() for row in cells for letter in row[i])]
    return as_text(table(columns, cells, numeric), width=WIDTH)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _records(names: Sequence[str], rows: Iterable[Data]) -> str:
    """A table of the named fields of records."""
    return _table(names, ([row[name] for name in names] for row in rows))


def plan_text(result: Data) -> str:
    """A plan: stages, speed-up, k, what limits, heat map, sweep, what-if."""
    spec, layout = result["spec"], result["layout"]
    title = (
        f"{spec['model']} on {spec['gpus']} x {spec['gpu']}, {spec['prompts']} x {spec['samples']} rollouts, "
        f"lag {spec['lag']}, {spec['method']}"
    )
    if layout["tensor"] * layout["data"] > 1:
        title += f"; a replica is tensor {layout['tensor']} x data {layout['data']}, experts over {layout['expert']}"
    by_k = ("k", "alpha", "round_cost", "generation_s", "generation_speedup", "step_speedup")
    curve = ("rate", "alpha", "generation", "step", "best_k", "best_generation", "best_step")
    sweep = ("gpus", "lag", "generation_gpus", "plain_step_s", "step_s", "generation_speedup", "step_speedup")
    parts = [
        title,
        _stages(result),
        _speedup(result),
        _records(by_k, result["by_k"]),
        _limits(result),
        "speed-up of generation / step against the acceptance length\n" + _heat(result),
        "against the acceptance rate per position, at the planned k and at the best\n"
        + _records(curve, result["acceptance_curve"]),
        _records(sweep, result["sweep"]),
        _records(("change", "generation_speedup", "step_speedup"), result["what_if"]),
        "\n".join(result["notes"]),
    ]
    return "\n\n".join(parts)


def _stages(result: Data) -> str:
    plain, fast, bands = result["plain"], result["speculative"], result["bands"]
    names = [name for name in plain if name.endswith("_s")]
    rows = [(name.removesuffix("_s"), seconds(plain[name]), seconds(fast[name])) for name in names]
    shown = _table(("stage, seconds", "plain", f"k = {fast['k']:.0f}"), rows)
    if not bands:
        return shown
    generation, learner = (
        f"-{1 - 1 / (1 + bands[name]):.0%} / +{bands[name]:.0%}" for name in ("generation", "learner")
    )
    return (
        f"{shown}\nseconds of generation within {generation}, the learner's within {learner}, for these lengths and "
        "this acceptance"
    )


def _speedup(result: Data) -> str:
    up, split, drafter = result["speedup"], result["split"], result["drafter"]
    lines = [
        f"generation {times(up['generation'])} ({up['generation_low']:.2f} to {up['generation_high']:.2f})",
        f"step       {times(up['step'])} ({up['step_low']:.2f} to {up['step_high']:.2f}); "
        f"{times(up['step_if_free'])} if rollouts were free",
        f"best k     {result['best_k']}",
        "k by batch " + ", ".join(f"up to {row['batch_up_to']:g}: {row['k']:.0f}" for row in result["schedule"]),
    ]
    if result["spec"]["lag"]:
        lines.append(f"split      {split['generation_gpus']} GPUs generate, {split['training_gpus']} train")
    if drafter:
        lines.append(
            f"drafter    {drafter['params'] / 1e6:.0f} M parameters, {drafter['step_s'] * 1e3:.2f} ms a step, "
            f"{drafter['share_of_round']:.0%} of a round; a round costs {drafter['round_cost']:.2f} plain steps at the "
            "mean batch"
        )
    return "\n".join(lines)


def _limits(result: Data) -> str:
    lines = ["what limits"]
    for name, shares in result["limits"].items():
        ranked = sorted(shares.items(), key=lambda item: -item[1])
        lines.append(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in ranked if share >= 0.01))
    return "\n".join(lines)


def _heat(result: Data) -> str:
    cells = {(cell["k"], cell["alpha"]): cell for cell in result["heat_map"]}
    lengths = sorted({alpha for _, alpha in cells})
    rows = []
    for k in sorted({k for k, _ in cells}):
        own = [cells.get((k, length)) for length in lengths]
        rows.append([f"k = {k}", *(f"{cell['generation']:.2f}/{cell['step']:.2f}" if cell else "" for cell in own)])
    return _table(["", *(f"{length:g}" for length in lengths)], rows)


def paper_text(result: Data) -> str:
    """Published cells against ours, calibration, sensitivity."""
    names = ("table", "cell", "published", "predicted")
    rows = [(*(row[name] for name in names), _signed(row["error"]), row["role"]) for row in result["rows"]]
    cells = _table(("table", "cell", "published", "ours", "error", "role"), rows)
    used = "\n".join(f"{cell}: {what}" for cell, what in result["calibration"].items())
    moved = [
        (row["model"], row["change"], percent(row["median"]), percent(row["worst"]), row["worst_cell"])
        for row in result["sensitivity"]
    ]
    other = _table(("model", "assumption", "median", "worst", "worst cell"), moved)
    return f"{cells}\n\ncalibrated on\n{used}\n\nerrors of the tested speed-ups under other assumptions\n{other}"


def _signed(error: float | None) -> str:
    return percent(error, signed=True)


def validation_text(result: Data) -> str:
    """Errors by family, operator and group, and the table of round costs."""
    parts = [f"{result['rows']} rows, {len(result['skipped'])} not covered; {result['rule']}"]
    if result["rows"] == 0:
        parts = ["No serving rows were given (--data FILE.csv): round costs alone, against the published points."]
    head = ("fit rows", "median", "test rows", "median", "mean", "worst")
    for name in ("families", "operators", "groups") if result["rows"] else ():
        parts.append(_table((name, *head), [_fit_and_test(entry) for entry in result[name]]))
    names = ("engine", "row", "k", "c_published", "c_predicted")
    rounds = [
        (*(row[name] for name in names), _signed(row["error"]), row["role"], row.get("sign_right", ""))
        for row in result["rounds"]
    ]
    parts.append(_table(("engine", "row", "k", "c published", "c ours", "error", "role", "sign right"), rounds))
    return "\n\n".join(parts)


def _fit_and_test(entry: Data) -> list[Any]:
    fit, test = entry["fit"], entry["test"]
    shares = [percent(test.get(key)) for key in ("median", "mean", "worst")]
    return [entry["name"], fit["rows"], percent(fit.get("median")), test["rows"], *shares]


def prediction_text(found: Data) -> str:
    """A prediction before the run: the step, its stages, the gain of speculation, and the assumptions."""
    stages, band, step_s = found["stages"], found["bands"]["step"], found["step_s"]
    lines = [
        f"predicted step {seconds(step_s)} s ({seconds(step_s / (1 + band))} to {seconds(step_s * (1 + band))}): "
        f"{', '.join(f'{name} {seconds(stages[name])}' for name in stages)}; "
        f"{found['rollouts']} rollouts, {found['tokens']:.0f} tokens"
    ]
    if found["speedup"]:
        up = found["speedup"]
        lines.append(
            f"speculation, k = {found['k']}, {found['alpha']:.2f} tokens per round: generation "
            f"{times(up['generation'])} ({up['generation_low']:.2f} to {up['generation_high']:.2f}) of "
            f"{seconds(found['plain_generation_s'])} s plain, step {times(up['step'])} ({up['step_low']:.2f} to "
            f"{up['step_high']:.2f})"
        )
    return "\n".join([*lines, found["origin"], *found["assumed"]])


def comparison_text(found: Data) -> str:
    """A prediction after the run: stage by stage, and the inputs that it could not know."""
    rows = [
        (
            row["stage"],
            seconds(row["predicted"]),
            seconds(row["measured"]),
            _signed(row["error"]),
            _signed(row["error_given"]),
            "yes" if row["within"] else "no",
        )
        for row in found["stages"]
    ]
    head = ("stage", "predicted s", "measured s", "error", "knowing lengths and acceptance", "within band")
    inputs = "; ".join(
        f"{name} {pair['predicted']:.4g} predicted, {pair['measured']:.4g} measured"
        for name, pair in found["inputs"].items()
    )
    return f"{_table(head, rows)}\n{inputs}; means over {found['steps']} steps"


def run_text(result: Data) -> str:
    """A calibrated run: constants, errors on the tested half, other settings, then its plan."""
    found, now = result["calibration"], result["now"]
    errors = [
        _tested(name, error, f"{now[f'{name}_s'] / now['step_s']:.1%}")
        for name, error in found["errors"].items()
        if error["steps"]
    ]
    if found["plain_error"]:
        errors.append(_tested("plain generation, compared", found["plain_error"], "outside"))
    head = ("stage", "tested steps", "share of the step", "median error", "worst", "of the sum")
    parts = [
        f"{result['run']}: {result['rule']}",
        _table(("constant", "ms"), [(name, f"{1e3 * value:.4g}") for name, value in found["constants_s"].items()]),
        _table(head, errors),
    ]
    if found["not_identified"]:
        parts.append("not identified by the run, nominal: " + "; ".join(found["not_identified"]))
    names = ("generation_s", "step_s", "tokens_per_s")
    rows = [(row["change"], *(seconds(row[name]) for name in names), _against(row)) for row in result["what_if"]]
    parts.append(_table(("how it would go with", "generation s", "step s", "tokens/s", "tokens/s against now"), rows))
    return "\n\n".join([*parts, plan_text(result["plan"])])


def _tested(name: str, error: Data, share: str) -> tuple[str, ...]:
    sizes = (percent(error["median"]), percent(error["worst"]), _signed(error["total"]))
    return (name, f"{error['steps']:.0f}", share, *sizes)


def _against(row: Data) -> str:
    if row["high"] - row["low"] < 0.005:
        return times(row["against_now"])
    return f"{times(row['against_now'])} ({row['low']:.2f} to {row['high']:.2f})"
