"""`plan.html`: a plan as one offline page, from the same data that `forerun plan --json` prints.

The data is that of a plan, or of a run that was calibrated and then planned; the second shows its errors too. The text
of the page is in `templates/plan.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forerun.report.format import percent, seconds, times
from forerun.report.page import write_page
from forerun.report.plots import CATEGORIES, STACKED_STAGES, Figure, Trace, bars, figure, heat_map, line, stage_bars
from forerun.types import STAGES

Data = Mapping[str, Any]
Rows = Sequence[tuple[str, ...]]
LAG_COLORS = ("--plain", "--speculative", "--stage-logprob", "--stage-train")


def write_plan(result: Data, path: Path | str) -> Path:
    """Write a plan's page.

    Args:
        result: `PlanResult.to_dict()`, or what `simulate.plan.run.plan_run` returns.

    Returns:
        The path of the page.

    Raises:
        UserError: the page cannot be written.
    """
    path = Path(path)
    planned = result.get("plan", result)
    spec = planned["spec"]
    name = f"{spec['model']} on {spec['gpus']} x {spec['gpu']}"
    write_page(
        path,
        "plan",
        f"{name}: Forerun plan",
        {
            "name": name,
            "run": result.get("run"),
            "rule": result.get("rule", "").capitalize(),
            "plan": planned,
            "keys": _key_figures(planned),
            "verdict": _verdict(planned),
            "figures": _figures(planned),
            "rows": _rows(planned),
            "calibration": _calibration(result) if result.get("calibration") else None,
        },
    )
    return path


def _key_figures(planned: Data) -> list[tuple[str, str]]:
    up = planned["speedup"]
    return [
        (times(up["generation"]), f"generation, {times(up['generation_low'])} to {times(up['generation_high'])}"),
        (times(up["step"]), f"step, {times(up['step_low'])} to {times(up['step_high'])}"),
        (str(planned["best_k"]), "best number of draft tokens per round"),
        (times(up["step_if_free"]), "step if rollouts were free: the most that any drafter can bring"),
    ]


def _verdict(planned: Data) -> str:
    fast, up = planned["speculative"], planned["speedup"]
    if not fast["k"] or up["step"] <= 1.0:
        return "Speculation is not predicted to shorten the step here; plain decoding is the plan."
    sure = "even at the lower end of its band" if up["step_low"] > 1.0 else "though not at the lower end of its band"
    return (
        f"With k = {fast['k']:.0f} and {fast['alpha']:.2f} tokens per round a step is predicted to take "
        f"{_seconds(fast['step_s'])} s instead of {_seconds(planned['plain']['step_s'])} s, faster {sure}."
    )


# ---- tables ----


def _rows(planned: Data) -> dict[str, Rows]:
    """Cells of the tables, by name."""
    plain, fast = planned["plain"], planned["speculative"]
    stages = [name.removesuffix("_s") for name in plain if name.endswith("_s")]
    settings = [(name, str(value)) for name, value in planned["spec"].items() if value not in ("", {}, None, ())]
    return {
        "stages": [
            (name.replace("_", " "), _seconds(plain[f"{name}_s"]), _seconds(fast[f"{name}_s"])) for name in stages
        ],
        "k": [
            (
                f"{row['k']:.0f}",
                f"{row['alpha']:.2f}",
                f"{row['round_cost']:.2f}",
                _seconds(row["generation_s"]),
                times(row["generation_speedup"]),
                times(row["step_speedup"]),
            )
            for row in planned["by_k"]
        ],
        "what_if": [
            (row["change"], times(row["generation_speedup"]), times(row["step_speedup"])) for row in planned["what_if"]
        ],
        "settings": settings,
    }


def _calibration(result: Data) -> dict[str, Any]:
    """Errors and constants of a calibrated run, and its other settings."""
    found = result["calibration"]
    errors = dict(found["errors"])
    if found["plain_error"]:
        errors["plain generation, compared"] = found["plain_error"]
    return {
        "errors": [
            (name, f"{e['steps']:.0f}", percent(e["median"]), percent(e["worst"]), percent(e["total"], signed=True))
            for name, e in errors.items()
            if e["steps"]
        ],
        "constants": [(name, f"{1e3 * value:.4g}") for name, value in found["constants_s"].items()],
        "not_identified": found["not_identified"],
        "otherwise": [
            (
                row["change"],
                _seconds(row["generation_s"]),
                _seconds(row["step_s"]),
                f"{row['tokens_per_s']:.1f}",
                times(row["against_now"]),
                f"{row['low']:.2f} to {row['high']:.2f}",
            )
            for row in result["what_if"]
        ],
        "figure": _otherwise_figure(result["what_if"]),
    }


def _seconds(value: float) -> str:
    return seconds(value, decimals=3)


# ---- figures ----


def _figures(planned: Data) -> dict[str, Figure]:
    return {
        "stages": _stage_figure(planned),
        "limits": _limit_figure(planned),
        "k": _k_figure(planned),
        "schedule": _schedule_figure(planned),
        "heat_generation": _heat_figure(planned, "generation"),
        "heat_step": _heat_figure(planned, "step"),
        "curve_generation": _curve_figure(planned, "generation"),
        "curve_step": _curve_figure(planned, "step"),
        "sweep_speedup": _sweep_figure(planned, "step_speedup"),
        "sweep_seconds": _sweep_figure(planned, "step_s"),
    }


def _stage_figure(planned: Data) -> Figure:
    arms = {name: planned[name] for name in ("speculative", "plain")}
    least_s = 0.05 * planned["plain"]["step_s"]  # a narrower bar has no room for its text
    data = []
    for stage in STAGES:
        values = [arm[f"{stage}_s"] for arm in arms.values()]
        data.append(stage_bars(stage, list(arms), values, [_seconds(s) if s > least_s else "" for s in values]))
    return figure(data, "seconds", "", STACKED_STAGES)


def _limit_figure(planned: Data) -> Figure:
    names = {"step": "Share of the speculative step", "decode": "Share of a plain decode step"}
    data = []
    for part, color in (("step", "--speculative"), ("decode", "--plain")):
        shares = sorted(planned["limits"].get(part, {}).items(), key=lambda item: -item[1])
        shown = {name: share for name, share in shares if share >= 0.01}
        if shown:
            data.append(bars(names[part], list(shown), list(shown.values()), color))
    return figure(data, "", "share", {"yaxis.tickformat": ".0%"})


def _k_figure(planned: Data) -> Figure:
    rows = planned["by_k"]
    ks = [row["k"] for row in rows]
    data = [
        line("generation", ks, [row["generation_speedup"] for row in rows], "--speculative"),
        line("step", ks, [row["step_speedup"] for row in rows], "--stage-train"),
        line("plain", ks, [1.0] * len(ks), "--plain", "dot"),
    ]
    return figure(data, "draft tokens per round, k", "speed-up", {"xaxis.dtick": 1})


def _schedule_figure(planned: Data) -> Figure:
    rows = planned["schedule"]
    labels = [f"up to {row['batch_up_to']:g}" for row in rows]
    drawn = bars("k", labels, [row["k"] for row in rows], "--speculative")
    return figure([drawn], "sequences at once", "best k", {"xaxis.type": "category"})


def _heat_figure(planned: Data, which: str) -> Figure:
    cells = {(cell["k"], cell["alpha"]): cell[which] for cell in planned["heat_map"]}
    trace = heat_map(cells, "{:.2f}", "k %{y}, %{x} tokens per round: %{text}x") | {"hoverongaps": False}
    layout = CATEGORIES | {"hovermode": "closest", "showlegend": False}
    data = [trace, *_ring(planned, cells)]
    return figure(data, "acceptance length, tokens per round", "k", layout)


def _ring(planned: Data, cells: Mapping[tuple[int, float], float]) -> list[Trace]:
    """A ring around the cell nearest to the planned k and acceptance length."""
    k, alpha = int(planned["speculative"]["k"]), planned["speculative"]["alpha"]
    if all(k != other for other, _ in cells):
        return []
    lengths = sorted({length for _, length in cells if length <= k + 1})
    nearest = min(lengths, key=lambda length: abs(length - alpha))
    marker = {"symbol": "circle-open", "size": 30, "color": "--text", "line": {"width": 2, "color": "--text"}}
    ring: Trace = {"type": "scatter", "mode": "markers", "x": [f"{nearest:g}"], "y": [str(k)], "marker": marker}
    return [ring | {"hoverinfo": "skip"}]


def _curve_figure(planned: Data, which: str) -> Figure:
    rows = planned["acceptance_curve"]
    rates = [row["rate"] for row in rows]
    data = [
        line(f"k = {planned['speculative']['k']:.0f}", rates, [row[which] for row in rows], "--speculative"),
        line("best k", rates, [row[f"best_{which}"] for row in rows], "--stage-train"),
        line("plain", rates, [1.0] * len(rates), "--plain", "dot"),
    ]
    return figure(data, "acceptance rate per position", "speed-up")


def _sweep_figure(planned: Data, which: str) -> Figure:
    """`which` ("step_speedup" or "step_s") against machines, a line per lag; of seconds, plain decoding dotted."""
    data = []
    for lag in sorted({row["lag"] for row in planned["sweep"]}):
        rows = [row for row in planned["sweep"] if row["lag"] == lag]
        color = LAG_COLORS[min(lag, len(LAG_COLORS) - 1)]
        gpus = [row["gpus"] for row in rows]
        data.append(line(f"lag {lag}", gpus, [row[which] for row in rows], color))
        if which == "step_s":
            data.append(line(f"lag {lag}, plain", gpus, [row["plain_step_s"] for row in rows], color, "dot"))
    layout = {"xaxis.type": "log", "xaxis.tickvals": sorted({row["gpus"] for row in planned["sweep"]})}
    x = "machines" if planned["spec"]["gpu"] == "CPU" else "GPUs"
    return figure(data, x, "seconds" if which == "step_s" else "speed-up of the step", layout)


def _otherwise_figure(rows: list[Data]) -> Figure:
    changes = [row["change"] for row in rows]
    return figure([bars("tokens/s", changes, [row["tokens_per_s"] for row in rows], "--speculative")], "", "tokens/s")
