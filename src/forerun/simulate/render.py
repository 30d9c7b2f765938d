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
        f"lag {spec['lag']}, {spec['method']}; a replica is tensor {layout['tensor']} x data {layout['data']}, "
        f"experts over {layout['expert']}"
    )
    parts = [title, _stages(result), _speedup(result), _by_k(result), _limits(result), _heat(result), _sweep(result)]
    parts += [_what_if(result), "\n".join(result["notes"])]
    return "\n\n".join(parts)


def _stages(result: Data) -> str:
    plain, fast = result["plain"], result["speculative"]
    names = [name for name in plain if name.endswith("_s")]
    rows = [(name.removesuffix("_s"), plain[name], fast[name]) for name in names]
    return table(("stage, seconds", "plain", f"k = {fast['k']:.0f}"), rows)


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
    rates = sorted({cell["rate"] for cell in cells})
    rows = []
    for k in sorted({cell["k"] for cell in cells}):
        own = {cell["rate"]: cell for cell in cells if cell["k"] == k}
        rows.append([f"k = {k}", *(f"{own[rate]['generation']:.2f}/{own[rate]['step']:.2f}" for rate in rates)])
    return "speed-up of generation / step against the acceptance rate\n" + table(["", *map(str, rates)], rows)


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
    for name in ("families", "operators", "groups"):
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
