"""Reads a run folder, complete or not: missing and broken files become sentences in `RunData.missing`, never errors.

A killed run has no summary.json; `provisional_summary` makes one from the metrics so far, with fewer entries under the
same keys. Of rollouts.jsonl, read line by line, a dozen samples are kept, from the first and the last step, spread over
the rewards.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.errors import UserError
from forerun.tracking.timeline import Event, read_timeline
from forerun.types import STAGES

FIRST_SAMPLES, LAST_SAMPLES = 4, 8
SAMPLES_IN_MEMORY = 256  # of one step


@dataclass(frozen=True, slots=True)
class RunData:
    """The content of a run folder. `metrics` has one dict per step, ascending, "step" among its keys."""

    path: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    env: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    finished: bool = False  # False: `summary` is provisional
    timeline: list[Event] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, at the steps that have it."""
        rows = [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]
        return [step for step, _ in rows], [value for _, value in rows]

    def names(self) -> list[str]:
        """Names of all logged metrics in order of appearance."""
        return list(dict.fromkeys(name for row in self.metrics for name in row if name != "step"))

    @property
    def algorithm(self) -> str:
        """The run's `train.algorithm`."""
        train = _recipe(self.config).get("train")
        return str(train.get("algorithm", "grpo")) if isinstance(train, dict) else "grpo"


def load_run(run_dir: Path | str) -> RunData:
    """Read a run folder. Raises UserError when the folder does not exist or holds none of a run's files."""
    path = Path(run_dir)
    files = ("config.resolved.yaml", "env.json", "metrics.jsonl", "rollouts.jsonl", "summary.json")
    if not any((path / name).exists() for name in files):
        raise UserError(f"{path} holds none of {', '.join(files)}: give the folder of a run, for example runs/latest.")
    missing = [f"{name} is missing." for name in files if not (path / name).exists()]
    metrics = read_metrics(path / "metrics.jsonl", missing)
    samples = _read_samples(path / "rollouts.jsonl", missing)
    summary = read_json(path / "summary.json", missing)
    config = _read_text(path / "config.resolved.yaml")
    env = read_json(path / "env.json", missing)
    timeline, broken = read_timeline(path / "timeline.json")
    if broken:
        missing.append(_broken_lines("timeline.json", broken))
    finished = bool(summary)
    if finished and metrics and metrics[-1]["step"] > (summary.get("steps") or metrics[-1]["step"]):
        missing.append(f"summary.json ends at step {summary['steps']}, metrics.jsonl at step {metrics[-1]['step']}.")
    if not finished:
        summary = provisional_summary(metrics, config)
    return RunData(path.resolve(), metrics, samples, summary, config, env, missing, finished, timeline)


def provisional_summary(metrics: list[dict[str, Any]], config: str) -> dict[str, Any]:
    """A summary from metrics and recipe alone, for a run without summary.json."""
    trained = [row for row in metrics if row.get("time/step") is not None]
    summary: dict[str, Any] = _recipe_facts(config)
    summary["steps"] = len(trained)
    summary["stage_seconds"] = {name: _mean(trained, f"time/{name}") for name in STAGES}
    summary["step_seconds"] = _mean(trained, "time/step")
    summary["overlap"] = overlap(trained)
    summary["acceptance_length"] = _mean(metrics, "spec/acceptance_length")
    positions = numbers(metrics, "spec/acceptance_pos_")
    summary["acceptance_per_position"] = [_mean(metrics, f"spec/acceptance_pos_{i}") for i in positions]
    summary["k"] = len(positions) or None
    summary["compare"] = _comparisons(metrics)
    evaluated = [row for row in metrics if row.get("eval/reward") is not None]
    if len(evaluated) > 1:
        first, last = evaluated[0], evaluated[-1]
        summary |= {"reward_start": first["eval/reward"], "reward_start_stderr": first.get("eval/stderr")}
        summary |= {"reward_end": last["eval/reward"], "reward_end_stderr": last.get("eval/stderr")}
    return {key: value for key, value in summary.items() if value not in (None, [], {})}


def overlap(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the steps of a run's metrics: the shares of the step in which learner and engine waited
    ("learner_idle", "engine_idle"), and the steps that waited for the learner ("steps_waiting", with lag only)."""
    steps = [row for row in rows if row.get("time/step")]
    names = {"learner_idle": "time/exposed_generation", "engine_idle": "time/engine_idle"}
    found = {key: [r[name] / r["time/step"] for r in steps if r.get(name) is not None] for key, name in names.items()}
    found["steps_waiting"] = [r["async/steps_waiting"] for r in steps if r.get("async/steps_waiting") is not None]
    return {key: statistics.median(values) for key, values in found.items() if values}


def _recipe(config: str) -> dict[str, Any]:
    """The recipe in config.resolved.yaml; empty for a broken one."""
    import yaml

    try:
        recipe = yaml.safe_load(config)
    except yaml.YAMLError:
        recipe = None
    return recipe if isinstance(recipe, dict) else {}


def _recipe_facts(config: str) -> dict[str, Any]:
    recipe = _recipe(config)
    speculation = recipe.get("speculation")
    return {
        "recipe": recipe.get("name") or recipe.get("recipe"),
        "seed": recipe.get("seed"),
        "speculation": speculation if isinstance(speculation, dict) else None,
    }


def _comparisons(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("plain_s", "spec_s", "plain_tokens", "spec_tokens", "plain_tokens_per_s", "spec_tokens_per_s", "speedup")
    rows = [row for row in metrics if row.get("compare/plain_s") is not None and row.get("compare/spec_s")]
    found = [{"step": row["step"]} | {key: row.get(f"compare/{key}") for key in keys} for row in rows]
    for row in found:
        row["speedup"] = row["speedup"] or row["plain_s"] / row["spec_s"]
    return found


def numbers(metrics: list[dict[str, Any]], stem: str) -> list[int]:
    """The numbers n of the metrics called `stem` and n, ascending."""
    names = {name for row in metrics for name in row if name.startswith(stem)}
    return sorted(int(name[len(stem) :]) for name in names if name[len(stem) :].isdigit())


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_json(path: Path, missing: list[str]) -> dict[str, Any]:
    """A JSON object; empty where the file is absent or broken, the latter with a sentence in `missing`."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        missing.append(f"{path.name} cannot be read as a JSON object.")
        return {}
    return value


def read_lines(path: Path, missing: list[str]) -> Iterator[dict[str, Any]]:
    """The lines that hold a JSON object with an integer "step"; `missing` gets a sentence on the others."""
    broken = 0
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row
                else:
                    broken += bool(line.strip())
    if broken:
        missing.append(_broken_lines(path.name, broken))


def _broken_lines(name: str, count: int) -> str:
    return f"{name} has {count} broken line{'s' * (count > 1)}, left out here."


def read_metrics(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    for row in read_lines(path, missing):
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def _read_samples(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for row in read_lines(path, missing):
        if last and row["step"] != last[0]["step"]:
            first, last = first or last, []
        if len(last) < SAMPLES_IN_MEMORY:
            last.append(row)
    return _spread(first, FIRST_SAMPLES) + _spread(last, LAST_SAMPLES)


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows evenly spaced in the order of reward, the best and the worst among them."""
    ranked = sorted(rows, key=lambda row: -(row.get("reward") or 0.0))
    if len(ranked) <= count:
        return ranked
    return [ranked[round(index * (len(ranked) - 1) / (count - 1))] for index in range(count)]
