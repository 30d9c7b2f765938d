"""`report.html`: one offline page that shows a run.

A page is a list of sections, each a function from the run's data to HTML or None. The page names those that have
nothing to show. More sections: `write_report(run, sections=[*SECTIONS, mine])`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from forerun.algorithms import definitions
from forerun.errors import UserError
from forerun.report import plots
from forerun.report.format import DASH, duration, number, times
from forerun.report.page import Chart, macro, write_page
from forerun.report.summary import (
    comparison_note,
    comparison_rows,
    predicted_plain_step_s,
    speculation_text,
    speedup_generation,
    stage_rows,
    verdict,
)
from forerun.tracking.environment import machine_line
from forerun.tracking.metrics import TERMS, define, definition_of, unit_of
from forerun.tracking.reader import RunData, load_run

Render = Callable[[RunData], str | None]


@dataclass(frozen=True, slots=True)
class Section:
    """A headed part of the page. `render` returns its HTML, already escaped, or None when there is nothing to show."""

    title: str
    render: Render


def write_report(run_dir: Path | str, sections: Sequence[Section] | None = None) -> Path:
    """Write `report.html` into a run folder from whatever files are there.

    Args:
        run_dir: the run's folder or a link to it.
        sections: what the page shows below its header; None for `SECTIONS`.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder holds no run, or the page cannot be written.
    """
    run = load_run(run_dir)
    rendered = [(s.title, s.render(run)) for s in (SECTIONS if sections is None else sections)]
    absent = [title for title, body in rendered if body is None]
    stages = [(stage.name, f"{stage.seconds:.3f}", f"{100 * stage.share:.1f}") for stage in stage_rows(run.summary)]
    name = str(run.summary.get("recipe") or run.path.name)
    path = run.path / "report.html"
    write_page(
        path,
        "run",
        f"{name}: Forerun report",
        {
            "name": name,
            "facts": _facts(run),
            "verdict": _verdict(run),
            "warnings": run.summary.get("warnings") or [],
            "notices": run.missing + ([f"Nothing to show for: {', '.join(absent)}."] if absent else []),
            "keys": _key_figures(run.summary),
            "speculation": speculation_text(run.summary),
            "comparison": comparison_rows(run.summary),
            "stages": stages,
            "note": comparison_note(run.summary),
            "sections": [(title, Markup(body)) for title, body in rendered if body is not None],
            "folder": run.path,
        },
    )
    return path


def _facts(run: RunData) -> str:
    summary = run.summary
    parts = [
        run.path.name,
        f"{summary['steps']} steps" if summary.get("steps") is not None else "",
        f"seed {summary['seed']}" if summary.get("seed") is not None else "",
        duration(summary["wall_s"]) if summary.get("wall_s") is not None else "",
        str(summary.get("machine") or machine_line(run.env)),
    ]
    return " · ".join(part for part in parts if part)


def _verdict(run: RunData) -> str:
    if run.finished:
        return verdict(run.summary)
    last = f"its metrics end at step {run.metrics[-1]['step']}" if run.metrics else "it left no metrics"
    so_far = f" So far: {verdict(run.summary)}" if run.summary.get("step_seconds") is not None else ""
    return f"This run has not finished: it left no summary, and {last}.{so_far}"


def _key_figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Value and label of the few numbers at the top of the page, the known ones."""
    plain_step = predicted_plain_step_s(summary)
    step = summary.get("step_seconds")
    start, end = summary.get("reward_start"), summary.get("reward_end")
    keys = [
        (times(speedup_generation(summary)), "generation, plain / speculative seconds"),
        (times(plain_step / step) if plain_step and step else DASH, "whole step, plain predicted"),
        (number(summary.get("acceptance_length")), "acceptance length, tokens per round"),
        (DASH if start is None or end is None else f"{start:.2f} → {end:.2f}", "held-out reward, start to end"),
    ]
    return [(value, label) for value, label in keys if value != DASH]


@dataclass(frozen=True, slots=True)
class RunCharts:
    """The figures of one run; a template calls it with name, title and caption."""

    run: RunData

    def __call__(self, name: str, title: str, caption: str) -> Chart:
        """The figure of that name in `FIGURES`."""
        return Chart(name, title, FIGURES[name](self.run), caption)


def figures_section(name: str) -> Render:
    """A section of figures: the macro of that name in sections.html.j2."""
    return lambda run: macro("sections", name, RunCharts(run)) or None


def overlap_section(run: RunData) -> str | None:
    """What learner and engines did at the same time, and how far generation was ahead."""
    found = run.summary.get("overlap") or {}
    idle = [f"{who} idle {found[f'{who}_idle']:.0%}" for who in ("learner", "engine") if f"{who}_idle" in found]
    if "steps_waiting" in found:
        idle.append(f"steps waiting for the learner: {found['steps_waiting']:.0f}")
    return macro("sections", "overlap", RunCharts(run), idle, plots.GANTT_STEPS) or None


def samples_section(run: RunData) -> str | None:
    """A dozen rollouts of the first and the last step."""
    return macro("sections", "samples", [_sample(sample) for sample in run.samples]) or None


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Facts and text of a rollout; `spans` are its tokens with whether each was accepted, where the record says so."""
    tokens, rounds = sample.get("tokens"), sample.get("rounds")
    mask, texts = sample.get("accepted_mask") or [], sample.get("token_texts") or []
    facts = (
        f"step {sample['step']}",
        f"reward {sample['reward']:.2f}" if sample.get("reward") is not None else "",
        f"{tokens} tokens" if tokens is not None else "",
        f"{tokens / rounds:.2f} per round" if tokens and rounds else "",
        f"ends: {sample['finish_reason']}" if sample.get("finish_reason") else "",
        f"prompt {sample['prompt_id']}" if sample.get("prompt_id") not in (None, "") else "",
    )
    return {
        "facts": [fact for fact in facts if fact],
        "prompt": sample.get("prompt", ""),
        "text": sample.get("text", ""),
        "spans": list(zip(texts, mask, strict=True)) if len(mask) == len(texts) else [],
    }


def metrics_section(run: RunData) -> str | None:
    """Every metric of the run with its first, mean and last value and its definition."""
    _define_metrics_of(run.algorithm)
    rows = []
    for name in run.names():
        values = run.series(name)[1]
        if values:
            mean = sum(values) / len(values)
            sentence = (definition_of(name) or "Not defined.").partition(" Unit: ")[0]
            rows.append((name, number(values[0]), number(mean), number(values[-1]), unit_of(name), sentence))
    return macro("sections", "metrics", rows) or None


def _define_metrics_of(algorithm: str) -> None:
    """Add the definitions that an algorithm brings; one that is not installed here leaves its metrics undefined."""
    with suppress(UserError, ValueError):
        define(definitions(algorithm))


def terms_section(run: RunData) -> str | None:
    """The terms that the page uses, and what they mean."""
    return macro("sections", "terms", TERMS)


def setup_section(run: RunData) -> str | None:
    """Files, recipe and environment, folded."""
    paths = [(name, path) for name, path in (run.summary.get("paths") or {}).items() if path]
    environment = json.dumps(run.env, indent=2, ensure_ascii=False) if run.env else ""
    return macro("sections", "setup", paths, run.config, environment) or None


FIGURES: dict[str, Callable[[RunData], plots.Figure | None]] = {
    "stages": plots.stages_per_step,
    "mean-step": plots.mean_step_bars,
    "compared": plots.compared_bars,
    "gantt": plots.gantt,
    "idle": plots.idle_curves,
    "queue": plots.waiting_curve,
    "lag": plots.lag_bars,
    "reward": plots.reward_curves,
    "positions": plots.position_curves,
    "acceptance": plots.acceptance_curve,
    "drafter-loss": plots.drafter_curve,
    "timeline": plots.timeline,
    "lengths": plots.length_curves,
    "truncated": plots.truncated_bars,
    "mismatch": plots.mismatch_curves,
    "entropy": plots.entropy_curve,
    "kl": plots.reference_curve,
    "clip": plots.clip_curves,
}

SECTIONS: tuple[Section, ...] = (
    Section("Time", figures_section("time")),
    Section("Overlap", overlap_section),
    Section("Reward", figures_section("reward")),
    Section("Acceptance", figures_section("acceptance")),
    Section("One rollout", figures_section("one_rollout")),
    Section("Lengths", figures_section("lengths")),
    Section("Policy", figures_section("policy")),
    Section("Samples", samples_section),
    Section("Metrics", metrics_section),
    Section("Terms", terms_section),
    Section("Setup", setup_section),
)
