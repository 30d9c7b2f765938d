"""`report.html`: one offline page that shows a run.

    write_report("runs/latest")

A page is a list of sections, each a function from the run's data to HTML or None. A section that returns None has
nothing to show for this run, and the page says so. More sections: `write_report(run, sections=[*SECTIONS, mine])`.
Everything that comes from a file is escaped. Left out: frame and style (`page.py`), figures (`plots.py`), figures
of other runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forerun.report import plots
from forerun.report.format import duration, number, times
from forerun.report.page import figure_html, figures_html, page_html, table_html, text
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
from forerun.tracking.files import write_atomically
from forerun.tracking.metrics import TERMS, definition_of, unit_of
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
    shown = SECTIONS if sections is None else sections
    rendered = [(section.title, section.render(run)) for section in shown]
    body = [header(run, [title for title, content in rendered if content is None])]
    body += [f"<h2>{text(title)}</h2>\n{content}" for title, content in rendered if content is not None]
    body.append(f"<footer>{text(run.path)}</footer>")
    path = run.path / "report.html"
    write_atomically(path, page_html(f"{_name(run)}: Forerun report", "\n".join(body)))
    return path


def header(run: RunData, absent: Sequence[str]) -> str:
    """Title, verdict, warnings, what is missing, key figures and the final table."""
    return "\n".join(
        part
        for part in (
            f"<h1>{text(_name(run))}</h1>",
            f'<p class="muted">{text(_facts(run))}</p>',
            f'<p class="verdict">{text(_verdict(run))}</p>',
            *(f'<p class="notice warning"><b>Warning</b> {text(w)}</p>' for w in run.summary.get("warnings") or []),
            _missing_notice(run, absent),
            _key_figures(run),
            _tables(run),
            "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>",
        )
        if part
    )


def _name(run: RunData) -> str:
    return str(run.summary.get("recipe") or run.path.name)


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


def _missing_notice(run: RunData, absent: Sequence[str]) -> str:
    sentences = list(run.missing)
    if absent:
        sentences.append(f"Nothing to show for: {', '.join(absent)}.")
    return f'<p class="notice">{text(" ".join(sentences))}</p>' if sentences else ""


def _key_figures(run: RunData) -> str:
    summary = run.summary
    plain_step, step = predicted_plain_step_s(summary), summary.get("step_seconds")
    rewards = summary.get("reward_start"), summary.get("reward_end")
    cells = [
        (times(speedup_generation(summary)), "generation, plain / speculative seconds"),
        (times(plain_step / step) if plain_step and step else "-", "whole step, plain predicted"),
        (number(summary.get("acceptance_length")), "acceptance length, tokens per round"),
        (f"{rewards[0]:.2f} → {rewards[1]:.2f}" if None not in rewards else "-", "held-out reward, start to end"),
    ]
    known = [(value, label) for value, label in cells if value != "-"]
    body = "".join(f'<div class="key"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in known)
    return f'<div class="keys">{body}</div>' if known else ""


def _tables(run: RunData) -> str:
    rows = [(row.label, row.plain, row.speculative, row.ratio) for row in comparison_rows(run.summary)]
    comparison = table_html((speculation_text(run.summary), "plain", "speculative", "ratio"), rows, (1, 2, 3))
    stages = [(stage.name, f"{stage.seconds:.3f}", f"{100 * stage.share:.1f}") for stage in stage_rows(run.summary)]
    mean_step = table_html(("mean step", "seconds", "%"), stages, (1, 2)) if stages else ""
    note = f'<p class="muted">{text(comparison_note(run.summary))}</p>'
    return f'<div class="tables"><div>{comparison}</div><div>{mean_step}</div></div>{note}'


def time_section(run: RunData) -> str | None:
    """Where the seconds of a step go, and what they would be without speculation."""
    return figures_html(
        (
            figure_html(
                "stages",
                "Seconds per step by stage",
                plots.stages_per_step(run),
                "The five stages of every step; evaluation, comparison and checkpoints are outside the step.",
            ),
            figure_html(
                "mean-step",
                "The mean step, plain and speculative",
                plots.mean_step_bars(run),
                "The plain step is predicted: the measured step with the compared plain generation time in it.",
            ),
            figure_html(
                "compared",
                "Generation of the same prompts, twice",
                plots.compared_bars(run),
                "Measured in this run: same prompts, batch and temperature, without and with the drafter.",
            ),
        )
    )


def reward_section(run: RunData) -> str | None:
    """Reward in training and on held-out prompts."""
    caption = "Training reward is of this step's own prompts and so jumps with them; held-out prompts stay the same."
    return figures_html([figure_html("reward", "Reward over steps", plots.reward_curves(run), caption)])


def acceptance_section(run: RunData) -> str | None:
    """How much of what is drafted the policy accepts, and whether that lasts as the policy moves."""
    return figures_html(
        (
            figure_html(
                "positions",
                "Acceptance per position",
                plots.position_curves(run),
                "Share of rounds in which all drafts up to this position were accepted. Falling lines: the policy "
                "leaves the drafter behind.",
            ),
            figure_html(
                "acceptance",
                "Acceptance length",
                plots.acceptance_curve(run),
                "Tokens emitted per round of draft and verify, bonus token included.",
            ),
            figure_html(
                "drafter-loss",
                "Drafter loss",
                plots.drafter_curve(run),
                "Training of the drafter beside the policy.",
            ),
        )
    )


def overlap_section(run: RunData) -> str | None:
    """Who was busy when: learner and engines side by side, and how far generation was ahead."""
    lanes = figures_html(
        (
            figure_html(
                "gantt",
                f"Learner and engines in the last {plots.GANTT_STEPS} steps",
                plots.gantt(run),
                "Numbers are steps. Blank is idle. The whole run is in timeline.json, which ui.perfetto.dev opens.",
            ),
        )
    )
    over_steps = figures_html(
        (
            figure_html(
                "idle",
                "Idle shares",
                plots.idle_curves(run),
                "The learner waits for rollouts; the engine neither generates nor loads weights (mean over replicas).",
            ),
            figure_html(
                "queue",
                "Steps waiting",
                plots.waiting_curve(run),
                "Steps that were generated when the learner finished one. At the limit, the engine waits.",
            ),
            figure_html(
                "lag",
                "Age of the tokens",
                plots.lag_bars(run),
                "Weight versions between the policy that sampled a token and the one that was trained with it.",
            ),
        )
    )
    if lanes is None and over_steps is None:
        return None
    return _overlap_words(run) + (lanes or "") + (over_steps or "")


def _overlap_words(run: RunData) -> str:
    found = run.summary.get("overlap") or {}
    parts = [f"{who} idle {found[key]:.0%}" for key, who in _IDLE.items() if key in found]
    if "steps_waiting" in found:
        parts.append(f"steps waiting for the learner: {found['steps_waiting']:.0f}")
    return f"<p>{text('Median step: ' + ', '.join(parts))}.</p>" if parts else ""


_IDLE = {"learner_idle": "learner", "engine_idle": "engine"}


def timeline_section(run: RunData) -> str | None:
    """One rollout from its first token to its last."""
    caption = "Sequences still generating. The long tail at small batch is where speculation has most to give."
    return figures_html([figure_html("timeline", "Live sequences over time", plots.timeline(run), caption)])


def length_section(run: RunData) -> str | None:
    """How long the rollouts are."""
    return figures_html(
        (
            figure_html(
                "lengths", "Tokens per rollout", plots.length_curves(run), "Generated tokens, prompt excluded."
            ),
            figure_html(
                "truncated",
                "Truncated rollouts",
                plots.truncated_bars(run),
                "Share that ended at the length limit instead of an end token.",
            ),
        )
    )


def policy_section(run: RunData) -> str | None:
    """Whether engine and learner agree on the tokens, and how the policy moves."""
    return figures_html(
        (
            figure_html(
                "mismatch",
                "Engine against learner",
                plots.mismatch_curves(run),
                "Disagreement about the probability of the same tokens; numerics alone give a small constant.",
            ),
            figure_html(
                "entropy",
                "Entropy of the policy",
                plots.entropy_curve(run),
                "Falling to zero, the policy stops exploring.",
            ),
            figure_html(
                "kl",
                "Distance from the reference",
                plots.reference_curve(run),
                "KL divergence from the policy to the frozen reference.",
            ),
            figure_html(
                "clip",
                "Clipped tokens",
                plots.clip_curves(run),
                "Share of tokens whose probability ratio left the trusted range.",
            ),
        )
    )


def samples_section(run: RunData) -> str | None:
    """A dozen rollouts of the first and the last step."""
    if not run.samples:
        return None
    coloured = any(_token_spans(sample) for sample in run.samples)
    legend = (
        '<p class="muted">Tokens: <span class="a">drafted and accepted</span>, '
        '<span class="c">corrected or bonus, sampled by the policy itself</span>. Both are samples of the policy.</p>'
    )
    listed = "".join(_sample(sample, index == 0) for index, sample in enumerate(run.samples))
    return (legend if coloured else "") + listed


def _sample(sample: dict[str, Any], opened: bool) -> str:
    tokens, rounds = sample.get("tokens"), sample.get("rounds")
    facts = (
        f"step {sample['step']}",
        f"reward {sample['reward']:.2f}" if sample.get("reward") is not None else "",
        f"{tokens} tokens" if tokens is not None else "",
        f"{tokens / rounds:.2f} per round" if tokens and rounds else "",
        f"ends: {sample['finish_reason']}" if sample.get("finish_reason") else "",
        f"prompt {sample['prompt_id']}" if sample.get("prompt_id") not in (None, "") else "",
    )
    line = "".join(f"<span>{text(fact)}</span> " for fact in facts if fact)
    answer = _token_spans(sample) or text(sample.get("text", ""))
    return (
        f"<details{' open' if opened else ''}><summary>{line}</summary>"
        f'<div class="sample"><h4>Prompt</h4><p class="text muted">{text(sample.get("prompt", ""))}</p>'
        f'<h4>Rollout</h4><p class="text">{answer}</p></div></details>'
    )


def _token_spans(sample: dict[str, Any]) -> str:
    """The rollout's tokens, each marked accepted or not; empty when the record does not tell."""
    mask, words = sample.get("accepted_mask"), sample.get("token_texts")
    if not mask or not words or len(mask) != len(words):
        return ""
    pairs = zip(mask, words, strict=True)
    return "".join(f'<i class="{"a" if accepted else "c"}">{text(word)}</i>' for accepted, word in pairs)


def metrics_section(run: RunData) -> str | None:
    """Every metric of the run with its first, mean and last value and its definition."""
    rows = []
    for name in run.names():
        values = run.series(name)[1]
        if values:
            mean = sum(values) / len(values)
            sentence = (definition_of(name) or "Not defined.").partition(" Unit: ")[0]
            rows.append((name, number(values[0]), number(mean), number(values[-1]), unit_of(name), sentence))
    if not rows:
        return None
    return table_html(("metric", "first", "mean", "last", "unit", "what it means"), rows, (1, 2, 3))


def terms_section(run: RunData) -> str | None:
    """The few words that the page uses in one fixed meaning."""
    return table_html(("term", "meaning"), list(TERMS.items()))


def setup_section(run: RunData) -> str | None:
    """Files, recipe and environment, folded."""
    paths = [(name, str(path)) for name, path in (run.summary.get("paths") or {}).items() if path]
    parts = [
        ("Files", table_html(("what", "where"), paths) if paths else ""),
        ("Configuration, with every default", _code(run.config)),
        ("Environment", _code(json.dumps(run.env, indent=2, ensure_ascii=False) if run.env else "")),
    ]
    folded = "".join(f"<details><summary>{text(title)}</summary>{body}</details>" for title, body in parts if body)
    return folded or None


def _code(source: str) -> str:
    return f"<pre>{text(source)}</pre>" if source else ""


SECTIONS: tuple[Section, ...] = (
    Section("Time", time_section),
    Section("Overlap", overlap_section),
    Section("Reward", reward_section),
    Section("Acceptance", acceptance_section),
    Section("One rollout", timeline_section),
    Section("Lengths", length_section),
    Section("Policy", policy_section),
    Section("Samples", samples_section),
    Section("Metrics", metrics_section),
    Section("Terms", terms_section),
    Section("Setup", setup_section),
)
