"""The report's figures as plotly's own JSON: {"data": [traces], "layout": {...}}.

A colour is the name of a CSS variable ("--speculative"), which the page resolves for light and dark. Fonts, margins,
grid and background are the page's (`static/page.js`). A layout key may be dotted. Each function of a run returns None
when the run has no data for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forerun.report.format import times
from forerun.report.summary import compared, stage_rows
from forerun.tracking.reader import RunData, numbers
from forerun.tracking.timeline import LEARNER, Event
from forerun.types import STAGES

Figure = dict[str, Any]
Trace = dict[str, Any]
Lines = dict[str, tuple[str, str]]  # {metric: (label, colour)}

POSITION_COLORS = 8  # CSS variables --position-1 to --position-8, dark to light
GANTT_STEPS = 4
GANTT_KINDS = {  # {label: (colour, events of the learner, events of an engine)}
    "data": ("--stage-data", ("data",), ()),
    "weights": ("--stage-prepare", ("prepare",), ("load",)),
    "waits for rollouts": ("--waiting", ("generation",), ()),
    "generates": ("--stage-generation", (), ("generate",)),
    "log-probabilities": ("--stage-logprob", ("logprob",), ()),
    "trains": ("--stage-train", ("train",), ()),
    "evaluation": ("--evaluation", ("evaluation",), ("evaluate",)),
    "comparison": ("--plain", ("compare",), ()),
    "checkpoint": ("--checkpoint", ("checkpoint",), ()),
    "starts again": ("--warning-fill", (), ("start",)),
}
BAND_COLORS = {name: f"--stage-{name}" for name in (*STAGES, "other")}
STACKED_STAGES = {"barmode": "stack", "hovermode": "closest", "yaxis.type": "category", "yaxis.showgrid": False}
FROM_ZERO = {"yaxis.rangemode": "tozero"}
CATEGORIES = {"xaxis.type": "category", "yaxis.type": "category"}


def line(name: str, xs: Sequence[float], ys: Sequence[float], color: str, dash: str = "solid") -> Trace:
    """A line with dots at its values."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(xs) <= 60 else "lines",
        "name": name,
        "x": list(xs),
        "y": list(ys),
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"color": color, "size": 6},
    }


def bars(name: str, xs: Sequence[Any], ys: Sequence[float], color: str, text: Sequence[str] = ()) -> Trace:
    """Vertical bars, each under its `text`."""
    trace: Trace = {"type": "bar", "name": name, "x": list(xs), "y": list(ys), "marker": {"color": color}}
    return trace | ({"text": list(text), "textposition": "outside", "cliponaxis": False} if text else {})


def horizontal_bars(
    name: str, rows: Sequence[str], lengths: Sequence[float | None], texts: Sequence[str], color: str, hover: str
) -> Trace:
    """A horizontal bar in each of the rows, with its text inside."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": list(rows),
        "x": list(lengths),
        "text": list(texts),
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "textfont": {"color": "--on-bar"},
        "marker": {"color": color},
        "hovertemplate": hover,
    }


def stage_bars(stage: str, rows: Sequence[str], seconds: Sequence[float], texts: Sequence[str]) -> Trace:
    """One stage of steps that are drawn as stacked horizontal bars (layout `STACKED_STAGES`)."""
    return horizontal_bars(stage, rows, seconds, texts, BAND_COLORS[stage], "%{x:.2f} s")


def heat_map(cells: Mapping[tuple[int, float], float], text: str, hover: str) -> Trace:
    """Speed-up over k (up) and another number (across): blue is faster than plain decoding, red slower.

    Args:
        cells: (k, other) -> speed-up; missing cells stay empty.
        text: format of a cell's text, e.g. "{:.2f}x".
        hover: plotly template.
    """
    ks = sorted({k for k, _ in cells})
    others = sorted({other for _, other in cells})
    values = [[cells.get((k, other)) for other in others] for k in ks]
    return {
        "type": "heatmap",
        "x": [f"{other:g}" for other in others],
        "y": [str(k) for k in ks],
        "z": values,
        "text": [["" if value is None else text.format(value) for value in row] for row in values],
        "texttemplate": "%{text}",
        "zmid": 1.0,
        "colorscale": "RdBu",
        "reversescale": True,
        "showscale": False,
        "hovertemplate": hover + "<extra></extra>",
    }


def figure(data: list[Trace], x: str, y: str, layout: dict[str, Any] | None = None) -> Figure:
    """Traces with titled axes; `layout` overrides single entries ("yaxis.type": "log")."""
    return {"data": data, "layout": {"xaxis.title.text": x, "yaxis.title.text": y} | (layout or {})}


def over_steps(run: RunData, y: str, names: Lines, layout: dict[str, Any] | None = None) -> Figure:
    """Lines over training steps, of the metrics that the run has."""
    data = []
    for metric, (label, color) in names.items():
        steps, values = run.series(metric)
        if steps:
            data.append(line(label, steps, values, color))
    return figure(data, "step", y, layout)


def curves(y: str, names: Lines, layout: dict[str, Any] | None = None) -> Callable[[RunData], Figure | None]:
    """The figure of `over_steps` as a function of a run."""
    return lambda run: _or_none(over_steps(run, y, names, layout))


def _or_none(drawn: Figure) -> Figure | None:
    return drawn if drawn["data"] else None


def stages_per_step(run: RunData) -> Figure | None:
    """Stacked bars of the five stages, with what they leave of the step on top."""
    rows = [row for row in run.metrics if row.get("time/step") is not None]
    if not rows:
        return None
    data, steps = [], [row["step"] for row in rows]
    inside = [sum(row.get(f"time/{name}") or 0.0 for name in STAGES) for row in rows]
    for name in STAGES:
        data.append(bars(name, steps, [row.get(f"time/{name}") or 0.0 for row in rows], BAND_COLORS[name]))
    other = [max(0.0, row["time/step"] - known) for row, known in zip(rows, inside, strict=True)]
    data.append(bars("other", steps, other, BAND_COLORS["other"]))
    return figure(data, "step", "seconds", {"barmode": "stack"})


def mean_step_bars(run: RunData) -> Figure | None:
    """Two horizontal bars, plain (predicted) over speculative, of the mean step by stage."""
    plain, spec = compared(run.summary, "plain_s"), compared(run.summary, "spec_s")
    rows = stage_rows(run.summary)
    total = sum(row.seconds for row in rows)
    if not rows or plain is None or spec is None:
        return None
    data = []
    for row in rows:
        seconds = [row.seconds, row.seconds + (plain - spec if row.name == "generation" else 0.0)]
        texts = [f"{value:.1f}" if value > 0.05 * total else "" for value in seconds]
        data.append(stage_bars(row.name, ["speculative", "plain<br>(predicted)"], seconds, texts))
    return figure(data, "seconds of the mean step", "", STACKED_STAGES | {"xaxis.showgrid": True})


def compared_bars(run: RunData) -> Figure | None:
    """Generation seconds of the compared steps, plain and speculative, with the ratio over the pair."""
    rows = run.summary.get("compare") or []
    rows = [row for row in rows if row.get("plain_s") is not None and row.get("spec_s") is not None]
    if not rows:
        return None
    labels = [f"step {row['step']}" for row in rows]
    ratios = [times(row["plain_s"] / row["spec_s"]) if row["spec_s"] else "" for row in rows]
    data = [
        bars("plain", labels, [row["plain_s"] for row in rows], "--plain"),
        bars("speculative", labels, [row["spec_s"] for row in rows], "--speculative", ratios),
    ]
    return figure(data, "", "generation seconds", {"barmode": "group", "xaxis.type": "category"})


def reward_curves(run: RunData) -> Figure | None:
    """Training reward per step and held-out reward with its standard error."""
    data = []
    steps, rewards = run.series("reward/mean")
    if steps:
        data.append(line("train, this step's rollouts", steps, rewards, "--plain"))
    steps, rewards = run.series("eval/reward")
    if steps:
        errors = dict(zip(*run.series("eval/stderr"), strict=True))
        held_out = line("held-out, ± standard error", steps, rewards, "--speculative")
        held_out["error_y"] = {
            "type": "data",
            "array": [errors.get(step, 0.0) for step in steps],
            "color": "--speculative",
            "thickness": 1.5,
            "width": 5,
        }
        data.append(held_out)
    return _or_none(figure(data, "step", "reward"))


def position_curves(run: RunData) -> Figure | None:
    """Cumulative acceptance per draft position over steps."""
    stem = "spec/acceptance_pos_"
    positions = numbers(run.metrics, stem)
    names = {f"{stem}{i}": (f"position {i}", f"--position-{min(i, POSITION_COLORS)}") for i in positions}
    return _or_none(over_steps(run, "share of rounds", names, {"yaxis.range": [0, 1]}))


def acceptance_curve(run: RunData) -> Figure | None:
    """Acceptance length over steps, with the number that k allows as a dashed line."""
    steps, lengths = run.series("spec/acceptance_length")
    if not steps:
        return None
    data = [line("acceptance length", steps, lengths, "--speculative")]
    k_steps, k_values = run.series("spec/k_mean")
    if k_steps:
        data.append(line("most possible, k + 1", k_steps, [k + 1 for k in k_values], "--plain", "dot"))
        data[-1]["mode"] = "lines"
    return figure(data, "step", "tokens per round", FROM_ZERO)


def timeline(run: RunData) -> Figure | None:
    """Live sequences against seconds in one rollout, plain and speculative on one clock."""
    data = []
    for name in ("plain", "speculative"):
        points = (run.summary.get("timeline") or {}).get(name) or []
        if points:
            trace = line(name, [point[0] for point in points], [point[1] for point in points], f"--{name}")
            trace["mode"], trace["fill"], trace["fillcolor"] = "lines", "tozeroy", f"--{name}-fill"
            trace["line"]["shape"] = "hv"
            data.append(trace)
    layout = FROM_ZERO | {"xaxis.rangemode": "tozero", "xaxis.type": "linear"}
    return _or_none(figure(data, "seconds since the rollout began", "live sequences", layout))


def gantt(run: RunData) -> Figure | None:
    """The last steps: a row for the learner and one for each engine, a bar per event."""
    stages = [event for event in run.timeline if event.lane == LEARNER and event.name in STAGES]
    if not stages:
        return None
    shown = [event for event in stages if event.step > max(event.step for event in stages) - GANTT_STEPS]
    start, end = min(e.start_s for e in shown), max(e.start_s + (e.seconds or 0.0) for e in shown)
    events = [e for e in run.timeline if e.start_s < end and e.start_s + (e.seconds or 0.0) > start]
    data = [_gantt_bars(label, events) for label in GANTT_KINDS] + [_gantt_losses(events)]
    lanes = [LEARNER, *sorted({e.lane for e in events} - {LEARNER}, key=lambda lane: (len(lane), lane))]
    layout = {"barmode": "overlay", "hovermode": "closest", "xaxis.range": [start, end], "xaxis.showgrid": True}
    layout |= {"yaxis.type": "category", "yaxis.categoryorder": "array", "yaxis.categoryarray": lanes[::-1]}
    layout |= {"yaxis.showgrid": False, "uniformtext.mode": "hide", "uniformtext.minsize": 9}
    return figure([trace for trace in data if trace["y"]], "seconds since the run began", "", layout)


def _gantt_bars(label: str, events: Sequence[Event]) -> Trace:
    color, of_learner, of_engines = GANTT_KINDS[label]
    drawn = [e for e in events if e.seconds is not None and e.name in (of_learner if e.lane == LEARNER else of_engines)]
    texts = [str(e.step) if label in ("generates", "trains") else "" for e in drawn]
    hover = "%{y}: " + label + ", %{customdata}<extra></extra>"
    trace = horizontal_bars(label, [e.lane for e in drawn], [e.seconds for e in drawn], texts, color, hover)
    versions = [f", version {e.version}" if e.version is not None else "" for e in drawn]
    trace["base"] = [e.start_s for e in drawn]
    trace["customdata"] = [f"step {e.step}{v}: {e.seconds:.3f} s" for e, v in zip(drawn, versions, strict=True)]
    return trace


def _gantt_losses(events: Sequence[Event]) -> Trace:
    lost = [e for e in events if e.seconds is None and e.name == "lost"]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "lost",
        "y": [e.lane for e in lost],
        "x": [e.start_s for e in lost],
        "marker": {"color": "--warning", "size": 10, "symbol": "x"},
        "hovertemplate": "%{y} was lost<extra></extra>",
    }


def idle_curves(run: RunData) -> Figure | None:
    """Shares of the step in which the learner waited for rollouts, and the engine for work."""
    data = []
    for label, metric, color in (
        ("learner", "time/exposed_generation", "--stage-train"),
        ("engine", "time/engine_idle", "--speculative"),
    ):
        rows = [row for row in run.metrics if row.get(metric) is not None and row.get("time/step")]
        if rows:
            data.append(line(label, [r["step"] for r in rows], [r[metric] / r["time/step"] for r in rows], color))
    return _or_none(figure(data, "step", "share of the step", {"yaxis.range": [0, 1.02], "yaxis.tickformat": ".0%"}))


def waiting_curve(run: RunData) -> Figure | None:
    """Generated steps that waited for the learner."""
    names = {"async/steps_waiting": ("steps waiting", "--speculative")}
    most = max(run.series("async/steps_waiting")[1], default=0.0)
    return _or_none(over_steps(run, "steps", names, FROM_ZERO | {"yaxis.dtick": 1 + int(most) // 6}))


def lag_bars(run: RunData) -> Figure | None:
    """Tokens of the whole run by the age of the weights that sampled them."""
    stem = "async/lag_tokens_"
    lags = numbers(run.metrics, stem)
    counts = [sum(run.series(f"{stem}{lag}")[1]) for lag in lags]
    if not sum(counts):
        return None
    shares = [count / sum(counts) for count in counts]
    trace = bars("tokens", [str(lag) for lag in lags], shares, "--speculative", [f"{share:.1%}" for share in shares])
    layout = {"xaxis.type": "category", "yaxis.tickformat": ".0%", "yaxis.range": [0, 1.1 * max(shares)]}
    return figure([trace], "lag, in weight versions", "share of tokens", layout)


def truncated_bars(run: RunData) -> Figure | None:
    """Share of rollouts that ended at the length limit."""
    steps, shares = run.series("length/truncated")
    if not steps:
        return None
    layout = {"yaxis.range": [0, max(0.1, *shares) * 1.1], "yaxis.tickformat": ".0%"}
    return figure([bars("truncated", steps, shares, "--stage-train")], "step", "share truncated", layout)


def mismatch_curves(run: RunData) -> Figure | None:
    """Difference between engine and learner on the same tokens, on a logarithmic axis."""
    names = {
        "mismatch/kl": ("KL, nats per token", "--speculative"),
        "mismatch/logp_diff_max": ("largest log-probability difference", "--plain"),
    }
    drawn = over_steps(run, "nats", names, {"yaxis.type": "log", "yaxis.exponentformat": "power"})
    for trace in drawn["data"]:
        trace["y"] = [value if value > 0 else None for value in trace["y"]]  # a logarithm has no zero
    shown = [value for trace in drawn["data"] for value in trace["y"] if value is not None]
    if not shown:
        return None
    if max(shown) > 30 * min(shown):
        drawn["layout"]["yaxis.dtick"] = 1  # powers of ten only
    return drawn


length_curves = curves(
    "tokens",
    {
        "length/mean": ("mean", "--speculative"),
        "length/p95": ("95th percentile", "--position-5"),
        "length/max": ("longest", "--plain"),
    },
    FROM_ZERO,
)
entropy_curve = curves("nats per token", {"policy/entropy": ("entropy", "--speculative")}, FROM_ZERO)
reference_curve = curves("nats per token", {"policy/kl": ("KL", "--speculative")})
clip_curves = curves(
    "share of tokens",
    {"policy/clip_low": ("clipped below", "--stage-logprob"), "policy/clip_high": ("clipped above", "--stage-train")},
    FROM_ZERO,
)
drafter_curve = curves("loss", {"draft/loss": ("drafter loss", "--stage-train")})
