"""What a run keeps from step to step: enough to write its summary, small enough to go into every checkpoint."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from forerun.engine import Counters
from forerun.types import STAGES

KEPT = (  # prefixes of the metrics that the summary and the check of the prediction need of every step
    "time/",
    "perf/gen_tokens",
    "spec/acceptance",
    "length/mean",
    "length/prompt_mean",
    "reward/zero_std_groups",
    "async/steps_waiting",
)


@dataclass(slots=True)
class History:
    """Plain numbers and lists only: it is stored as JSON."""

    step: int = 0  # finished steps
    evaluations: list[dict[str, float]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)  # seconds, one entry per step
    counters: Counters = field(default_factory=Counters)  # of training generation
    timeline: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    wall_s: float = 0.0
    lines: list[dict[str, float | None]] = field(default_factory=list)  # of each step what `KEPT` names

    def add_step(self, seconds: dict[str, float], counters: Counters, metrics: dict[str, float | None]) -> None:
        """A step is finished: its stages' seconds, what the engine counted, and its metrics."""
        self.step += 1
        self.stages.append(dict(seconds))
        self.counters = self.counters.plus(counters)
        self.lines.append({name: value for name, value in metrics.items() if name.startswith(KEPT)})

    def to_json(self) -> dict[str, Any]:
        """The state as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> History:
        """Inverse of `to_json`."""
        return cls(**{**data, "counters": Counters(**data["counters"])})

    def summary(self) -> dict[str, Any]:
        """The figures of `summary.json` that follow from the history."""
        first, last = (self.evaluations[0], self.evaluations[-1]) if self.evaluations else ({}, {})
        c = self.counters
        return {
            "steps": self.step,
            "speedup_generation": _median([x["speedup"] for x in self.comparisons]),
            "speedup_tokens_per_s": _median(
                [x["spec_tokens_per_s"] / x["plain_tokens_per_s"] for x in self.comparisons]
            ),
            "compare": self.comparisons,
            "acceptance_length": c.acceptance_length,
            "acceptance_per_position": c.acceptance_per_position,
            "rounds": c.rounds,
            "tokens_generated": c.tokens,
            "stage_seconds": {s: _mean([x[s] for x in self.stages]) for s in STAGES},
            "step_seconds": _mean([sum(x[s] for s in STAGES) for x in self.stages]),
            "reward_start": first.get("eval/reward"),
            "reward_start_stderr": first.get("eval/stderr"),
            "reward_end": last.get("eval/reward"),
            "reward_end_stderr": last.get("eval/stderr"),
            "eval_prompts": first.get("eval/prompts"),
            "timeline": self.timeline,
            "wall_s": self.wall_s,
        }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None
