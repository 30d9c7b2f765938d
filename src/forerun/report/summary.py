"""The final table as sentences and rows, for console and report.

A summary is the content of summary.json, complete or not: what is missing becomes a dash or no row. Plain step time is
predicted, not measured, and labelled so: step - speculative generation + plain generation, the two generation times
being those of the compared steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from forerun.report.format import DASH, number, times
from forerun.types import STAGES


class Row(NamedTuple):
    """One row of the comparison. `ratio` is above 1 where speculation is better."""

    label: str
    plain: str
    speculative: str
    ratio: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the mean step, in seconds and as a share of the step."""

    name: str
    seconds: float
    share: float


def compared(summary: Mapping[str, Any], key: str) -> float | None:
    """Median of one number over the compared steps; None when nothing was compared."""
    values = [row[key] for row in summary.get("compare") or [] if row.get(key) is not None]
    return statistics.median(values) if values else None


def speedup_generation(summary: Mapping[str, Any]) -> float | None:
    """Plain over speculative generation seconds: the summary's own, else the median over its compared steps."""
    stated = summary.get("speedup_generation")
    return stated if stated is not None else compared(summary, "speedup")


def predicted_plain_step_s(summary: Mapping[str, Any]) -> float | None:
    """Predicted seconds of a plain step: step - speculative generation + plain generation."""
    step, plain, spec = summary.get("step_seconds"), compared(summary, "plain_s"), compared(summary, "spec_s")
    if step is None or plain is None or spec is None:
        return None
    return step - spec + plain


def is_speculative(summary: Mapping[str, Any]) -> bool:
    """Whether the run used a drafter."""
    return (summary.get("speculation") or {}).get("method", "none") not in (None, "none")


def speculation_text(summary: Mapping[str, Any]) -> str:
    """Drafter, k and the rule in force, e.g. "eagle3, k = 5, block verification"."""
    if not is_speculative(summary):
        return "no speculation"
    block = summary["speculation"]
    k = summary.get("k", block.get("k"))
    verify = (summary.get("in_force") or block).get("rule", block.get("verify"))
    parts = [str(block["method"]), f"k = {k}" if k is not None else "", f"{verify} verification" if verify else ""]
    return ", ".join(part for part in parts if part)


def comparison_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The rows plain | speculative | ratio of the final table."""
    plain_step, step = predicted_plain_step_s(summary), summary.get("step_seconds")
    rows = [
        Row(
            "generation, s",
            number(compared(summary, "plain_s")),
            number(compared(summary, "spec_s")),
            times(speedup_generation(summary)),
        ),
        _throughput_row(summary),
        Row(
            "step, s (plain: predicted)",
            number(plain_step),
            number(step),
            times(plain_step / step) if plain_step is not None and step else DASH,
        ),
    ]
    if summary.get("acceptance_length") is not None:
        rows.append(Row("acceptance length", "1", _acceptance_text(summary)))
    if per_position := summary.get("acceptance_per_position"):
        label = f"accepted through position 1..{len(per_position)}"
        rows.append(Row(label, DASH, " ".join(f"{rate:.2f}" for rate in per_position)))
    return rows


def _throughput_row(summary: Mapping[str, Any]) -> Row:
    plain, spec = compared(summary, "plain_tokens_per_s"), compared(summary, "spec_tokens_per_s")
    return Row("generation, tokens/s", number(plain), number(spec), times(spec / plain) if plain and spec else DASH)


def _acceptance_text(summary: Mapping[str, Any]) -> str:
    length, k = summary["acceptance_length"], summary.get("k")
    return f"{length:.2f}" + (f" of {k + 1}" if isinstance(k, int) else "")


def comparison_note(summary: Mapping[str, Any]) -> str:
    """How the comparison was measured, in a sentence."""
    count = len(summary.get("compare") or [])
    if not count:
        return "Plain decoding was not measured in this run."
    steps = f"medians over {count} steps" if count > 1 else "one step"
    return f"Generation: {steps}, each generated twice from the same prompts, batch and temperature."


def stage_rows(summary: Mapping[str, Any]) -> list[Stage]:
    """The five stages of the mean step, and its remainder as "other"; empty without stage times."""
    seconds = summary.get("stage_seconds") or {}
    known = [(name, float(seconds[name])) for name in STAGES if seconds.get(name) is not None]
    if not known:
        return []
    inside = sum(value for _, value in known)
    total = max(float(summary.get("step_seconds") or inside), inside)
    if total - inside > 0.005 * total:
        known.append(("other", total - inside))
    return [Stage(name, value, value / total if total else 0.0) for name, value in known]


def reward_text(summary: Mapping[str, Any]) -> str | None:
    """Held-out reward at start and end with standard errors, and whether the change is larger than those."""
    start, end = summary.get("reward_start"), summary.get("reward_end")
    if start is None or end is None:
        return None
    errors = [summary.get("reward_start_stderr"), summary.get("reward_end_stderr")]
    prompts = summary.get("eval_prompts")
    words = f"{_with_error(start, errors[0])} to {_with_error(end, errors[1])}"
    words += f" on {prompts:.0f} held-out prompts" if prompts else ""
    if None in errors or not any(errors):
        return words
    sigmas = (end - start) / math.hypot(*(error or 0.0 for error in errors))
    return words + (f" ({sigmas:+.1f} standard errors)" if abs(sigmas) >= 2 else " (within two standard errors)")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def verdict(summary: Mapping[str, Any]) -> str:
    """The run in one or two sentences: speed-up, and change of the reward."""
    if not summary:
        return "This run has not finished: it left no summary."
    reward = reward_text(summary)
    return _speed_sentence(summary) + (f" Reward went from {reward}." if reward else "")


def _speed_sentence(summary: Mapping[str, Any]) -> str:
    if not is_speculative(summary):
        return "This run generated without speculation."
    ratio, length = speedup_generation(summary), summary.get("acceptance_length")
    drafted = f"{speculation_text(summary)}" + (f", {length:.2f} tokens per round" if length is not None else "")
    if ratio is None:
        return f"This run speculated ({drafted}) and did not measure plain decoding, so its speed-up is not known."
    if ratio < 1:
        return f"Speculation made generation slower: {times(ratio)} of plain speed ({drafted})."
    plain, step = predicted_plain_step_s(summary), summary.get("step_seconds")
    saved = f" and took {number(plain - step, 2)} s off a step of {number(plain)} s" if plain and step else ""
    return f"Speculation made generation {times(ratio)} as fast{saved} ({drafted})."
