"""The planner's results as rows of plain text.

Conventions: one string per result, columns padded with blanks, no colour. Left out: plots; the report draws them from
the same data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Data = Mapping[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a header, each column as wide as its widest cell."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _percent(value: float) -> str:
    return f"{value:+.1%}"


def plan_text(result: Data) -> str:
    """A plan: stages, speed-up, k, what limits, heat map, sweep, what-if."""
    spec, layout = result["spec"], result["layout"]
    title = (
        f"{spec['model']} on {spec['gpus']} x {spec['gpu']}, {spec['prompts']} x {spec['samples']} rollouts, "
        f"lag {spec['lag']}, {spec['method']}"
    )
    if layout["tensor"] * layout["data"] > 1:
        title += f"; a replica is tensor {layout['tensor']} x data {layout['data']}, experts over {layout['expert']}"
    parts = [title, _stages(result), _speedup(result), _by_k(result), _limits(result), _heat(result), _curve(result)]
    parts += [_sweep(result), _what_if(result), "\n".join(result["notes"])]
    return "\n\n".join(parts)


def _stages(result: Data) -> str:
    plain, fast = result["plain"], result["speculative"]
    names = [name for name in plain if name.endswith("_s")]
    rows = [(name.removesuffix("_s"), _seconds(plain[name]), _seconds(fast[name])) for name in names]
    shown = table(("stage, seconds", "plain", f"k = {fast['k']:.0f}"), rows)
    bands = result["bands"]
    if not bands:
        return shown
    learner = f"the learner's within -{_below(bands['learner'])} / +{bands['learner']:.0%}"
    generation = f"-{_below(bands['generation'])} / +{bands['generation']:.0%}"
    return f"{shown}\nseconds of generation within {generation}, {learner}, for these lengths and this acceptance"


def _below(band: float) -> str:
    return f"{1 - 1 / (1 + band):.0%}"


def _speedup(result: Data) -> str:
    up, split = result["speedup"], result["split"]
    lines = [
        f"generation {up['generation']:.2f}x ({up['generation_low']:.2f} to {up['generation_high']:.2f})",
        f"step       {up['step']:.2f}x ({up['step_low']:.2f} to {up['step_high']:.2f}); "
        f"{up['step_if_free']:.2f}x if rollouts were free",
        f"best k     {result['best_k']}",
        "k by batch " + ", ".join(f"up to {row['batch_up_to']:g}: {row['k']:.0f}" for row in result["schedule"]),
    ]
    if result["spec"]["lag"]:
        lines.append(f"split      {split['generation_gpus']} GPUs generate, {split['training_gpus']} train")
    if result["drafter"]:
        d = result["drafter"]
        lines.append(
            f"drafter    {d['params'] / 1e6:.0f} M parameters, {d['step_s'] * 1e3:.2f} ms a step, "
            f"{d['share_of_round']:.0%} of a round; a round costs {d['round_cost']:.2f} plain steps at the mean batch"
        )
    return "\n".join(lines)


def _by_k(result: Data) -> str:
    names = ("k", "alpha", "round_cost", "generation_s", "generation_speedup", "step_speedup")
    return table(names, [[row[name] for name in names] for row in result["by_k"]])


def _limits(result: Data) -> str:
    lines = []
    for name, shares in result["limits"].items():
        ranked = sorted(shares.items(), key=lambda item: -item[1])
        lines.append(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in ranked if share >= 0.01))
    return "what limits\n" + "\n".join(lines)


def _heat(result: Data) -> str:
    cells = result["heat_map"]
    lengths = sorted({cell["alpha"] for cell in cells})
    rows = []
    for k in sorted({cell["k"] for cell in cells}):
        own = {cell["alpha"]: f"{cell['generation']:.2f}/{cell['step']:.2f}" for cell in cells if cell["k"] == k}
        rows.append([f"k = {k}", *(own.get(length, "") for length in lengths)])
    head = ["", *(f"{length:g}" for length in lengths)]
    return "speed-up of generation / step against the acceptance length\n" + table(head, rows)


def _curve(result: Data) -> str:
    names = ("rate", "alpha", "generation", "step", "best_k", "best_generation", "best_step")
    rows = [[row[name] for name in names] for row in result["acceptance_curve"]]
    return "against the acceptance rate per position, at the planned k and at the best\n" + table(names, rows)


def _sweep(result: Data) -> str:
    names = ("gpus", "lag", "generation_gpus", "plain_step_s", "step_s", "generation_speedup", "step_speedup")
    return table(names, [[row[name] for name in names] for row in result["sweep"]])


def _what_if(result: Data) -> str:
    names = ("change", "generation_speedup", "step_speedup")
    return table(names, [[row[name] for name in names] for row in result["what_if"]])


def paper_text(result: Data) -> str:
    """Published cells beside ours, calibration, sensitivity."""
    rows = [
        (row["table"], row["cell"], row["published"], row["predicted"], _percent(row["error"]), row["role"])
        for row in result["rows"]
    ]
    cells = table(("table", "cell", "published", "ours", "error", "role"), rows)
    used = "\n".join(f"{cell}: {what}" for cell, what in result["calibration"].items())
    moved = [
        (row["model"], row["change"], f"{row['median']:.1%}", f"{row['worst']:.1%}", row["worst_cell"])
        for row in result["sensitivity"]
    ]
    other = table(("model", "assumption", "median", "worst", "worst cell"), moved)
    return f"{cells}\n\ncalibrated on\n{used}\n\nerrors of the tested speed-ups under other assumptions\n{other}"


def validation_text(result: Data) -> str:
    """Errors by family, operator and group, and the table of round costs."""
    parts = [f"{result['rows']} rows, {len(result['skipped'])} not covered; {result['rule']}"]
    if result["rows"] == 0:
        parts = ["No serving rows were given (--data FILE.csv): round costs alone, against the published points."]
    for name in ("families", "operators", "groups") if result["rows"] else ():
        rows = [_error_row(entry) for entry in result[name]]
        parts.append(table((name, "fit rows", "median", "test rows", "median", "mean", "worst"), rows))
    rounds = [
        (
            row["engine"],
            row["row"],
            row["k"],
            row["c_published"],
            row["c_predicted"],
            _percent(row["error"]),
            row["role"],
            row.get("sign_right", ""),
        )
        for row in result["rounds"]
    ]
    parts.append(table(("engine", "row", "k", "c published", "c ours", "error", "role", "sign right"), rounds))
    return "\n\n".join(parts)


def _error_row(entry: Data) -> list[Any]:
    fit, test = entry["fit"], entry["test"]
    return [
        entry["name"],
        fit["rows"],
        _share(fit, "median"),
        test["rows"],
        *(_share(test, key) for key in ("median", "mean", "worst")),
    ]


def _share(found: Data, key: str) -> str:
    return f"{found[key]:.1%}" if key in found else "-"


def prediction_text(found: Data) -> str:
    """A prediction before the run: the step, its stages, what speculation brings, and what all that rests on."""
    stages, bands = found["stages"], found["bands"]
    parts = ", ".join(f"{name} {_seconds(stages[name])}" for name in stages)
    low, high = (found["step_s"] / (1 + bands["step"]), found["step_s"] * (1 + bands["step"]))
    lines = [
        f"predicted step {_seconds(found['step_s'])} s ({_seconds(low)} to {_seconds(high)}): {parts}; "
        f"{found['rollouts']} rollouts, {found['tokens']:.0f} tokens"
    ]
    if found["speedup"]:
        up = found["speedup"]
        lines.append(
            f"speculation, k = {found['k']}, {found['alpha']:.2f} tokens per round: generation {up['generation']:.2f}x "
            f"({up['generation_low']:.2f} to {up['generation_high']:.2f}) of {_seconds(found['plain_generation_s'])} s "
            f"plain, step {up['step']:.2f}x ({up['step_low']:.2f} to {up['step_high']:.2f})"
        )
    return "\n".join([*lines, found["origin"], *found["assumed"]])


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def comparison_text(found: Data) -> str:
    """A prediction after the run: stage by stage, and what was the inputs' fault."""
    rows = [
        (
            row["stage"],
            _seconds(row["predicted"]),
            _seconds(row["measured"]),
            _maybe_percent(row["error"]),
            _maybe_percent(row["error_given"]),
            "yes" if row["within"] else "no",
        )
        for row in found["stages"]
    ]
    head = ("stage", "predicted s", "measured s", "error", "knowing lengths and acceptance", "within band")
    inputs = "; ".join(
        f"{name} {pair['predicted']:.4g} predicted, {pair['measured']:.4g} measured"
        for name, pair in found["inputs"].items()
    )
    return f"{table(head, rows)}\n{inputs}; means over {found['steps']} steps"


def _maybe_percent(value: float | None) -> str:
    return "-" if value is None else _percent(value)


def run_text(result: Data) -> str:
    """A calibrated run: constants, errors on the tested half, how it would go otherwise, then its plan."""
    found = result["calibration"]
    constants = [(name, f"{1e3 * seconds:.4g}") for name, seconds in found["constants_s"].items()]
    now = result["now"]
    errors = [
        _tested(name, error, f"{now[f'{name}_s'] / now['step_s']:.1%}")
        for name, error in found["errors"].items()
        if error["steps"]
    ]
    if found["plain_error"]:
        errors.append(_tested("plain generation beside", found["plain_error"], "outside"))
    parts = [
        f"{result['run']}: {result['rule']}",
        table(("constant", "ms"), constants),
        table(("stage", "tested steps", "share of the step", "median error", "worst", "of the sum"), errors),
    ]
    if found["not_identified"]:
        parts.append("not told by the run, nominal: " + "; ".join(found["not_identified"]))
    names = ("generation_s", "step_s", "tokens_per_s")
    rows = [(row["change"], *(_seconds(row[name]) for name in names), _against(row)) for row in result["what_if"]]
    parts.append(table(("how it would go with", "generation s", "step s", "tokens/s", "tokens/s against now"), rows))
    return "\n\n".join([*parts, plan_text(result["plan"])])


def _tested(name: str, error: Data, share: str) -> tuple[str, ...]:
    sizes = (f"{error['median']:.1%}", f"{error['worst']:.1%}", _percent(error["total"]))
    return (name, f"{error['steps']:.0f}", share, *sizes)


def _against(row: Data) -> str:
    if row["high"] - row["low"] < 0.005:
        return f"{row['against_now']:.2f}x"
    return f"{row['against_now']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"
