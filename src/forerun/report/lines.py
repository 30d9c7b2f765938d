"""What the console prints, as pure functions: the line of a step, the progress of a stage, the final table.

Lines carry names and units and are ASCII. "accept 3.1/6" is the acceptance length over its largest value, k + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from forerun.report.format import duration, number
from forerun.report.summary import comparison_note, comparison_rows, speculation_text, stage_rows, verdict
from forerun.report.tables import table

if TYPE_CHECKING:
    from rich.console import RenderableType

Metrics = Mapping[str, float | None]


def step_line(step: int, total: int, metrics: Metrics, last_reward: float | None, eta_s: float | None) -> str:
    """One step in one line, such as "step  42/200 | reward 0.61 +0.02 | len 58 (trunc 3%) | gen 11.4s 402 tok/s ...".

    The signed number after the reward is the change since the step before. Missing metrics are skipped.
    """
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        _reward(metrics, last_reward),
        _length(metrics),
        _generation(metrics),
        _joined(
            _value("logprob", metrics.get("time/logprob"), "{:.1f}s"),
            _value("train", metrics.get("time/train"), "{:.1f}s"),
        ),
        _value("", metrics.get("time/step"), "{:.1f}s/step"),
        _small("kl", metrics.get("policy/kl") or None),  # 0 without train.kl
        _small("mismatch", metrics.get("mismatch/kl")),
        _value("", metrics.get("compare/speedup"), "{:.2f}x plain"),
        _evaluation(metrics),
        eta(eta_s),
    ]
    return " | ".join(part for part in parts if part)


def eta(seconds: float | None) -> str:
    """Time left; empty where it is not known."""
    return "" if seconds is None else f"eta {duration(seconds)}"


def progress_text(done: float, total: float, unit: str, rate: float | None) -> str:
    """Such as "320/512 rollouts, 12.5/s, 15s left". `total` 0: not known; `rate` in units per second."""
    text = f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"
    if not rate:
        return text
    left = f", {duration((total - done) / rate)} left" if total else ""
    return f"{text}, {number(rate)}/s{left}"


def _reward(metrics: Metrics, last: float | None) -> str:
    reward = metrics.get("reward/mean")
    change = None if reward is None or last is None else reward - last
    return _joined(_value("reward", reward, "{:.2f}"), _value("", change, "{:+.2f}"))


def _length(metrics: Metrics) -> str:
    length = _value("len", metrics.get("length/mean"), "{:.0f}")
    return _joined(length, _value("", metrics.get("length/truncated"), "(trunc {:.0%})")) if length else ""


def _generation(metrics: Metrics) -> str:
    accept = _value("accept", metrics.get("spec/acceptance_length"), "{:.1f}")
    k = metrics.get("spec/k_mean")
    return _joined(
        _value("gen", metrics.get("time/generation"), "{:.1f}s"),
        _value("", metrics.get("perf/gen_tokens_per_s"), "{:.0f} tok/s"),
        accept + (f"/{k + 1:g}" if accept and k else ""),
    )


def _evaluation(metrics: Metrics) -> str:
    reward = _value("eval", metrics.get("eval/reward"), "{:.3f}")
    return _joined(reward, _value("+-", metrics.get("eval/stderr"), "{:.3f}"))


def _value(label: str, value: float | None, form: str) -> str:
    return "" if value is None else f"{label} {form.format(value)}".strip()


def _small(label: str, value: float | None) -> str:
    return "" if value is None else f"{label} {number(value, 2)}"


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def summary_parts(summary: Mapping[str, Any]) -> list[RenderableType]:
    """The final table in parts that rich prints: comparison, stages, and the lines below them."""
    from rich.markup import escape

    parts: list[RenderableType] = ["", _comparison_table(summary), f"[dim]{escape(comparison_note(summary))}[/]"]
    if stage_rows(summary):
        parts += ["", _stage_table(summary)]
    parts += ["", escape(verdict(summary))]
    parts += [f"[bold red]WARNING[/] {escape(str(text))}" for text in summary.get("warnings") or []]
    return [*parts, "", _paths_table(summary)]


def _comparison_table(summary: Mapping[str, Any]) -> RenderableType:
    steps = f", {summary['steps']} steps" if summary.get("steps") is not None else ""
    title = f"{summary.get('recipe', 'run')}{steps}: {speculation_text(summary)}"
    return table(("", "plain", "speculative", "ratio"), comparison_rows(summary), numeric=(1, 2, 3), title=title)


def _stage_table(summary: Mapping[str, Any]) -> RenderableType:
    stages = stage_rows(summary)
    decimals = 2 if sum(stage.seconds for stage in stages) >= 1 else 4
    columns = ["mean step", *(stage.name for stage in stages)]
    rows = (
        ["seconds", *(f"{stage.seconds:.{decimals}f}" for stage in stages)],
        ["percent", *(f"{100 * stage.share:.1f}" for stage in stages)],
    )
    return table(columns, rows, numeric=range(1, len(columns)))


def _paths_table(summary: Mapping[str, Any]) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    paths = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    paths.add_column(no_wrap=True)
    paths.add_column(overflow="fold")
    if summary.get("wall_s") is not None:
        paths.add_row("wall time", duration(summary["wall_s"]))
    if summary.get("machine"):
        paths.add_row("machine", escape(str(summary["machine"])))
    for name, path in (summary.get("paths") or {}).items():
        if path:
            paths.add_row(name, escape(str(path)))
    return paths
