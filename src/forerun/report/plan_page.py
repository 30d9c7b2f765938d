"""`plan.html`: a plan as one offline page, from the same data that `forerun plan --json` prints.

    write_plan(result, "plan.html")

The result is that of a plan, or of a run that was calibrated and then planned; the second shows its errors too. Colours
of the heat maps follow the convention of the benchmarks: blue is faster, red is slower than plain decoding.
Left out: the papers' tables (`forerun plan --paper` prints them) and the simulation itself (`simulate/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forerun.report.page import figure_html, figures_html, page_html, table_html, text
from forerun.report.plots import BAND_COLORS, Figure, Trace, bars, figure, line
from forerun.tracking.files import write_atomically
from forerun.types import STAGES

Data = Mapping[str, Any]
LAG_COLORS = ("--plain", "--speculative", "--stage-logprob", "--stage-train")


def write_plan(result: Data, path: Path | str) -> Path:
    """Write a plan's page.

    Args:
        result: `PlanResult.to_dict()`, or what `simulate.run.plan_run` returns.

    Returns:
        The path of the page.

    Raises:
        UserError: the page cannot be written.
    """
    path = Path(path)
    planned = result.get("plan", result)
    body = [_header(result, planned), _calibration(result), *_sections(planned), _settings(planned)]
    write_atomically(path, page_html(f"{_title(planned)}: Forerun plan", "\n".join(part for part in body if part)))
    return path


def _title(planned: Data) -> str:
    spec = planned["spec"]
    return f"{spec['model']} on {spec['gpus']} x {spec['gpu']}"


def _header(result: Data, planned: Data) -> str:
    spec, up = planned["spec"], planned["speedup"]
    facts = (
        f"{spec['prompts']} x {spec['samples']} rollouts a step, at most {spec['cap_tokens']} tokens, "
        f"lag {spec['lag']}, {spec['method']}, {spec['precision']}"
    )
    if "run" in result:
        facts += f" · calibrated on {result['run']}"
    keys = (
        (_times(up["generation"]), f"generation, {_times(up['generation_low'])} to {_times(up['generation_high'])}"),
        (_times(up["step"]), f"step, {_times(up['step_low'])} to {_times(up['step_high'])}"),
        (str(planned["best_k"]), "best number of draft tokens per round"),
        (_times(up["step_if_free"]), "step if rollouts were free: the most that any drafter can bring"),
    )
    cells = "".join(f'<div class="key"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in keys)
    return (
        f'<h1>{text(_title(planned))}</h1><p class="muted">{text(facts)}</p>'
        f'<p class="verdict">{text(_verdict(planned))}</p><div class="keys">{cells}</div>'
        + "".join(f'<p class="notice">{text(note)}</p>' for note in planned["notes"])
        + "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
    )


def _verdict(planned: Data) -> str:
    fast, up = planned["speculative"], planned["speedup"]
    if not fast["k"] or up["step"] <= 1.0:
        return "Speculation is not predicted to shorten the step here; plain decoding is the plan."
    sure = "even at the lower end of its band" if up["step_low"] > 1.0 else "though not at the lower end of its band"
    return (
        f"With k = {fast['k']:.0f} and {fast['alpha']:.2f} tokens per round a step is predicted to take "
        f"{_seconds(fast['step_s'])} s instead of {_seconds(planned['plain']['step_s'])} s, faster {sure}."
    )


def _sections(planned: Data) -> list[str]:
    drawn = (
        ("Step", (_stage_figure(planned), _limit_figure(planned)), _stage_table(planned)),
        ("Draft length", (_k_figure(planned), _schedule_figure(planned)), _k_table(planned)),
        ("Draft length and acceptance", (_heat_figure(planned, "generation"), _heat_figure(planned, "step")), ""),
        ("Acceptance", (_curve_figure(planned, "generation"), _curve_figure(planned, "step")), _what_if(planned)),
        ("Machines and lag", (_sweep_figure(planned, "step_speedup"), _sweep_figure(planned, "step_s")), ""),
    )
    return [f"<h2>{text(title)}</h2>\n{figures_html(figures) or ''}{tables}" for title, figures, tables in drawn]


def _stage_figure(planned: Data) -> str:
    arms = {"speculative": planned["speculative"], "plain": planned["plain"]}
    total_s = planned["plain"]["step_s"]
    data = []
    for stage in STAGES:
        seconds = [arm[f"{stage}_s"] for arm in arms.values()]
        trace: Trace = {"type": "bar", "orientation": "h", "name": stage, "y": list(arms), "x": seconds}
        trace |= {"text": [_seconds(s) if s > 0.05 * total_s else "" for s in seconds], "textposition": "inside"}
        trace |= {"textangle": 0, "insidetextanchor": "middle", "textfont": {"color": "--on-bar"}}
        data.append(trace | {"marker": {"color": BAND_COLORS[stage]}, "hovertemplate": "%{x:.2f} s"})
    layout = {"barmode": "stack", "hovermode": "closest", "yaxis.type": "category", "yaxis.showgrid": False}
    lag = planned["spec"]["lag"]
    caption = "The five stages one after another." if not lag else (
        "Work per stage; with lag, generation runs beside the learner and only its exposed part lengthens the step."
    )  # fmt: skip
    return figure_html("plan-stages", "Predicted seconds by stage", figure(data, "seconds", "", layout), caption)


def _limit_figure(planned: Data) -> str:
    names = {"step": "Share of the speculative step", "decode": "Share of a plain decode step"}
    data = []
    for part, color in (("step", "--speculative"), ("decode", "--plain")):
        shares = sorted(planned["limits"].get(part, {}).items(), key=lambda item: -item[1])
        shown = [(name, share) for name, share in shares if share >= 0.01]
        data.append(bars(names[part], [n for n, _ in shown], [s for _, s in shown], color) if shown else None)
    drawn = figure([trace for trace in data if trace], "", "share", {"yaxis.tickformat": ".0%"})
    return figure_html(
        "plan-limits", "What limits", drawn, "The largest bar is where faster hardware or code would pay."
    )


def _stage_table(planned: Data) -> str:
    plain, fast = planned["plain"], planned["speculative"]
    names = [name for name in plain if name.endswith("_s")]
    rows = [(name.removesuffix("_s").replace("_", " "), _seconds(plain[name]), _seconds(fast[name])) for name in names]
    return table_html(("stage", "plain, s", f"k = {fast['k']:.0f}, s"), rows, (1, 2)) + _drafter(planned["drafter"])


def _drafter(drafter: Data) -> str:
    if not drafter:
        return ""
    size = f"{drafter['params'] / 1e6:.0f} M parameters, " if drafter["params"] else ""
    return (
        f"<p>Drafter: {size}{1e3 * drafter['step_s']:.2f} ms a draft token, {drafter['share_of_round']:.0%} of a "
        f"round; a round costs {drafter['round_cost']:.2f} plain steps at the mean batch.</p>"
    )


def _k_figure(planned: Data) -> str:
    rows = planned["by_k"]
    ks = [row["k"] for row in rows]
    data = [
        line("generation", ks, [row["generation_speedup"] for row in rows], "--speculative"),
        line("step", ks, [row["step_speedup"] for row in rows], "--stage-train"),
        line("plain", ks, [1.0] * len(ks), "--plain", "dot"),
    ]
    drawn = figure(data, "draft tokens per round, k", "speed-up", {"xaxis.dtick": 1})
    return figure_html(
        "plan-k", "Speed-up against k", drawn, "At the planned acceptance; each k on its own best split."
    )


def _schedule_figure(planned: Data) -> str:
    rows = planned["schedule"]
    labels = [f"up to {row['batch_up_to']:g}" for row in rows]
    drawn = figure([bars("k", labels, [row["k"] for row in rows], "--speculative")], "sequences at once", "best k")
    drawn["layout"]["xaxis.type"] = "category"
    return figure_html("plan-schedule", "Best k by batch", drawn, "What a row budget would choose as a batch drains.")


def _k_table(planned: Data) -> str:
    head = ("k", "tokens per round", "round cost", "generation, s", "generation", "step")
    rows = [
        (
            f"{row['k']:.0f}",
            f"{row['alpha']:.2f}",
            f"{row['round_cost']:.2f}",
            _seconds(row["generation_s"]),
            _times(row["generation_speedup"]),
            _times(row["step_speedup"]),
        )
        for row in planned["by_k"]
    ]
    return table_html(head, rows, range(6))


def _heat_figure(planned: Data, which: str) -> str:
    cells = {(cell["k"], cell["alpha"]): cell[which] for cell in planned["heat_map"]}
    ks, lengths = sorted({k for k, _ in cells}), sorted({alpha for _, alpha in cells})
    values = [[cells.get((k, alpha)) for alpha in lengths] for k in ks]
    trace: Trace = {
        "type": "heatmap",
        "x": [f"{alpha:g}" for alpha in lengths],
        "y": [str(k) for k in ks],
        "z": values,
        "text": [["" if value is None else f"{value:.2f}" for value in row] for row in values],
        "texttemplate": "%{text}",
        "zmid": 1.0,
        "colorscale": "RdBu",
        "reversescale": True,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "k %{y}, %{x} tokens per round: %{text}x<extra></extra>",
    }
    layout = {"xaxis.type": "category", "yaxis.type": "category", "hovermode": "closest"}
    drawn = figure([trace, *_here(planned, ks, lengths)], "acceptance length, tokens per round", "k", layout)
    drawn["layout"]["showlegend"] = False
    caption = "Blue is faster than plain decoding, red slower; the ring is the cell nearest to this plan. Without lag."
    return figure_html(f"plan-heat-{which}", f"Speed-up of {_of(which)}", drawn, caption)


def _of(which: str) -> str:
    return {"generation": "generation", "step": "the step"}[which]


def _here(planned: Data, ks: Sequence[int], lengths: Sequence[float]) -> list[Trace]:
    """A ring around the cell nearest to the planned k and acceptance length."""
    k, alpha = int(planned["speculative"]["k"]), planned["speculative"]["alpha"]
    if k not in ks:
        return []
    nearest = min((length for length in lengths if length <= k + 1), key=lambda length: abs(length - alpha))
    marker = {"symbol": "circle-open", "size": 30, "color": "--text", "line": {"width": 2, "color": "--text"}}
    return [{"type": "scatter", "mode": "markers", "x": [f"{nearest:g}"], "y": [str(k)], "marker": marker,
             "hoverinfo": "skip"}]  # fmt: skip


def _curve_figure(planned: Data, which: str) -> str:
    rows = planned["acceptance_curve"]
    rates = [row["rate"] for row in rows]
    data = [
        line(f"k = {planned['speculative']['k']:.0f}", rates, [row[which] for row in rows], "--speculative"),
        line("best k", rates, [row[f"best_{which}"] for row in rows], "--stage-train"),
        line("plain", rates, [1.0] * len(rates), "--plain", "dot"),
    ]
    drawn = figure(data, "acceptance rate per position", "speed-up")
    caption = "What a better or a worse drafter would bring; the same rate at every position, without lag."
    return figure_html(f"plan-curve-{which}", f"Speed-up of {_of(which)} against acceptance", drawn, caption)


def _what_if(planned: Data) -> str:
    head = ("if", "generation", "step")
    rows = [
        (row["change"], _times(row["generation_speedup"]), _times(row["step_speedup"])) for row in planned["what_if"]
    ]
    return table_html(head, rows, (1, 2))


def _sweep_figure(planned: Data, which: str) -> str:
    data = []
    for lag in sorted({row["lag"] for row in planned["sweep"]}):
        rows = [row for row in planned["sweep"] if row["lag"] == lag]
        color, gpus = LAG_COLORS[min(lag, len(LAG_COLORS) - 1)], [row["gpus"] for row in rows]
        data.append(line(f"lag {lag}", gpus, [row[which] for row in rows], color))
        if which == "step_s":
            data.append(line(f"lag {lag}, plain", gpus, [row["plain_step_s"] for row in rows], color, "dot"))
    layout = {"xaxis.type": "log", "xaxis.tickvals": sorted({row["gpus"] for row in planned["sweep"]})}
    if which == "step_s":
        drawn = figure(data, "machines" if planned["spec"]["gpu"] == "CPU" else "GPUs", "seconds", layout)
        caption = "Dotted lines decode plainly. Each point has its own best split between generation and training."
        return figure_html("plan-sweep-seconds", "Step seconds against machines and lag", drawn, caption)
    drawn = figure(data, "machines" if planned["spec"]["gpu"] == "CPU" else "GPUs", "speed-up of the step", layout)
    caption = (
        "Lag hides generation behind training: where it does so fully, speculation frees machines instead of time."
    )
    return figure_html("plan-sweep-speedup", "Speed-up of the step against machines and lag", drawn, caption)


def _calibration(result: Data) -> str:
    """What a calibrated run says of itself; empty for a plan without one."""
    found = result.get("calibration")
    if not found:
        return ""
    errors = dict(found["errors"]) | ({"plain generation beside": found["plain_error"]} if found["plain_error"] else {})
    rows = [
        (name, f"{e['steps']:.0f}", f"{e['median']:.1%}", f"{e['worst']:.1%}", f"{e['total']:+.1%}")
        for name, e in errors.items()
        if e["steps"]
    ]
    head = ("stage", "tested steps", "median error", "worst", "of the sum")
    constants = [(name, f"{1e3 * seconds:.4g}") for name, seconds in found["constants_s"].items()]
    vague = "; ".join(found["not_identified"])
    note = f'<p class="notice">Not told by the run, nominal: {text(vague)}.</p>' if vague else ""
    return (
        f'<h2>Calibration</h2><p class="muted">{text(result["rule"].capitalize())}.</p>'
        f'<div class="tables"><div>{table_html(head, rows, range(1, 5))}</div>'
        f"<div>{table_html(('constant', 'ms'), constants, (1,))}</div></div>{note}"
        f"<h2>How the run would go otherwise</h2>{_otherwise(result)}"
    )


def _otherwise(result: Data) -> str:
    rows = result["what_if"]
    cells = [
        (
            row["change"],
            _seconds(row["generation_s"]),
            _seconds(row["step_s"]),
            f"{row['tokens_per_s']:.1f}",
            _times(row["against_now"]),
            f"{row['low']:.2f} to {row['high']:.2f}",
        )
        for row in rows
    ]
    head = ("change", "generation, s", "step, s", "tokens/s", "against now", "left open by the run")
    drawn: Figure = figure(
        [bars("tokens/s", [r["change"] for r in rows], [r["tokens_per_s"] for r in rows], "--speculative")],
        "",
        "tokens/s",
    )
    caption = "Tokens per second of the whole step, predicted by the calibrated machine."
    return (figures_html([figure_html("plan-otherwise", "Other settings", drawn, caption)]) or "") + table_html(
        head, cells, range(1, 6)
    )


def _settings(planned: Data) -> str:
    spec = [(name, str(value)) for name, value in planned["spec"].items() if value not in ("", {}, None, ())]
    return f"<h2>What was planned</h2>{table_html(('setting', 'value'), spec)}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"
