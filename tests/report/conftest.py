"""One small finished run, as files, for the tests of console and page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forerun.algorithms import definitions
from forerun.tracking.metrics import define
from forerun.tracking.run_folder import RunFolder

NASTY = "</script><script>alert('text')</script><img src=x onerror=alert(1)> & \"quotes\""


@pytest.fixture
def summary() -> dict[str, Any]:
    compare = [
        {
            "step": step,
            "plain_s": 20.0,
            "spec_s": 12.5,
            "plain_tokens": 5000,
            "spec_tokens": 5000,
            "plain_tokens_per_s": 250.0,
            "spec_tokens_per_s": 400.0,
            "speedup": 1.6,
        }
        for step in (1, 2, 3)
    ]
    return {
        "run": "r",
        "recipe": "quickstart",
        "steps": 3,
        "seed": 0,
        "speedup_generation": 1.6,
        "compare": compare,
        "acceptance_length": 2.9,
        "acceptance_per_position": [0.82, 0.63, 0.45],
        "k": 3,
        "rounds": 900,
        "stage_seconds": {"data": 0.1, "prepare": 0.2, "generation": 12.5, "logprob": 2.0, "train": 15.0},
        "step_seconds": 30.0,
        "reward_start": 0.31,
        "reward_end": 0.52,
        "reward_start_stderr": 0.03,
        "reward_end_stderr": 0.04,
        "eval_prompts": 128,
        "tokens_generated": 15000,
        "speculation": {"method": "eagle3", "draft": "head", "k": 3, "verify": "block"},
        "timeline": {"speculative": [[0.0, 8], [5.0, 2], [12.5, 0]], "plain": [[0.0, 8], [9.0, 2], [20.0, 0]]},
        "warnings": ["acceptance fell"],
        "paths": {"metrics": "runs/r/metrics.jsonl", "report": "runs/r/report.html"},
        "wall_s": 125.0,
        "machine": "a machine",
    }


@pytest.fixture
def run(tmp_path: Path, summary: dict[str, Any]) -> RunFolder:
    define(definitions("grpo"))  # as the learner does
    folder = RunFolder.create(tmp_path, "quickstart")
    folder.write_config(f"name: quickstart\nspeculation: {{method: eagle3, k: 3, verify: block}}\nprompt: '{NASTY}'\n")
    folder.write_env()
    folder.log(0, {"eval/reward": 0.31, "eval/stderr": 0.03})
    for step in (1, 2, 3):
        folder.log(step, step_metrics(step))
        folder.log_rollouts(rollout(step, index) for index in range(10))
    folder.log(3, {"eval/reward": 0.52, "eval/stderr": 0.04})
    folder.write_summary(summary)
    return folder


def step_metrics(step: int) -> dict[str, float | None]:
    """Metrics of one step with every group that the page draws."""
    return {
        "reward/mean": 0.3 + 0.05 * step,
        "length/mean": 58.0,
        "length/p95": 100.0,
        "length/max": 128.0,
        "length/truncated": 0.03,
        "mismatch/kl": 3e-4,
        "mismatch/logp_diff_max": 0.0,
        "policy/entropy": 0.6,
        "policy/clip_low": 0.01,
        "time/data": 0.1,
        "time/prepare": 0.2,
        "time/generation": 12.5,
        "time/logprob": 2.0,
        "time/train": 15.0,
        "time/step": 30.0,
        "time/exposed_generation": 12.5,
        "time/engine_idle": 17.0,
        "perf/gen_tokens_per_s": 400.0,
        "spec/acceptance_length": 2.9,
        "spec/k_mean": 3.0,
        "spec/acceptance_pos_1": 0.82,
        "spec/acceptance_pos_2": 0.63,
        "compare/plain_s": 20.0,
        "compare/spec_s": 12.5,
    }


def rollout(step: int, index: int) -> dict[str, Any]:
    """One rollout record whose prompt and text hold markup; every other one with coloured tokens."""
    record: dict[str, Any] = {"step": step, "prompt_id": f"<p{index}>", "prompt": NASTY, "text": NASTY}
    record |= {"reward": index / 10, "advantage": 0.0, "tokens": 3, "finish_reason": "eos", "rounds": 2}
    if index % 2:
        record |= {"accepted_mask": [True, False, True], "token_texts": ["<b>", " &amp; ", NASTY]}
    return record
