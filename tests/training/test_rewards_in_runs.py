"""Whole runs whose rewards are hard to compute, fail or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import forerun
from command_line import run_here
from signals import hear_signals
from tiny_models import ALPHABET, save_tiny, tiny_tokenizer

TOWER = "#### 9^{9^{9}}"
HELPERS = str(Path(__file__).parents[1] / "helpers")


@pytest.fixture(autouse=True)
def rewards_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HELPERS)


def save_parrot(folder: Path, text: str) -> Path:
    """A policy that says `text` in every token: the residual stream is the embedding, whose first entry decides."""
    save_tiny(folder)
    tiny_tokenizer([*ALPHABET[:-1], text]).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[-1, 0] = 20.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """recipe(policy, **task settings) -> a recipe of two steps with eight rollouts each."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))

    def make(policy: Path, **task: Any) -> Path:
        data: dict[str, Any] = {
            "name": "tiny",
            "runs": str(tmp_path / "runs"),
            "policy": {"model": str(policy), "dtype": "float32", "device": "cpu"},
            "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), **task},
            "rollout": {"slots": 8, "max_new_tokens": 2},
            "train": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4},
            "eval": {"prompts": 0},
            "checkpoint": {"every": 0},
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
        return tmp_path / "tiny.yaml"

    return make


def steps_of(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_a_policy_that_writes_a_tower_in_every_answer_trains_on(recipe: Callable[..., Path], tmp_path: Path) -> None:
    made = recipe(save_parrot(tmp_path / "parrot", TOWER))
    started = time.perf_counter()
    summary = forerun.train(str(made))
    assert time.perf_counter() - started < 20.0
    (warning,) = summary["warnings"]
    assert "does not compute the answer" in warning
    steps = steps_of(summary["run"])
    assert [(s["reward/mean"], s["reward/failed"], s["reward/timeout"]) for s in steps] == [(0.0, 8.0, 0.0)] * 2
    text = json.loads((Path(summary["run"]) / "rollouts.jsonl").read_text().splitlines()[0])["text"]
    assert text == TOWER * 2


def test_a_reward_that_computes_the_tower_misses_its_deadline_and_is_counted(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    policy = save_parrot(tmp_path / "parrot", "power")
    settings = {"reward": "rewards_for_tests:last_does", "reward_timeout_s": 0.2, "reward_failures": 1.0}
    summary = forerun.train(str(recipe(policy, **settings)), {"train.steps": 1})
    (step,) = steps_of(summary["run"])
    assert (step["reward/mean"], step["reward/timeout"]) == (0.0, 8.0) and step["time/reward"] < 10.0
    (warning,) = summary["warnings"]
    assert "not there after task.reward_timeout_s=0.2 s on problem" in warning


def test_parts_are_logged_and_a_printing_reward_leaves_the_json_alone(
    recipe: Callable[..., Path], tiny: Callable[..., Path]
) -> None:
    several = {"rewards_for_tests:length": 1.0, "rewards_for_tests:prints": 0.5}
    done = run_here("train", str(recipe(tiny("llama"), rewards=several)), "--json")
    summary = json.loads(done.stdout)
    for step in steps_of(summary["run"]):
        assert step["reward/length/mean"] == pytest.approx(
            step["reward/length.tokens/mean"] + step["reward/length.cut/mean"]
        )
        assert step["reward/mean"] == pytest.approx(step["reward/length/mean"] + 0.5 * step["reward/prints/mean"])
        assert step["reward/prints/mean"] == 1.0


def test_with_lag_a_hanging_reward_costs_its_own_answer_alone(
    recipe: Callable[..., Path], tiny: Callable[..., Path], forked_workers: None
) -> None:
    made = recipe(tiny("llama"), reward="rewards_for_tests:hangs_at_times", reward_timeout_s=0.3)
    summary = forerun.train(str(made), {"rollout.replicas": 1, "loop.lag": 1, "train.steps": 3})
    steps = steps_of(summary["run"])
    assert len(steps) == 3 and 0 < sum(s["reward/timeout"] for s in steps) < 12
    assert all(s["reward/failed"] == 0.0 for s in steps)


def test_the_first_ctrl_c_is_heard_while_a_reward_hangs(recipe: Callable[..., Path], tiny: Callable[..., Path]) -> None:
    made = recipe(tiny("llama"), reward="rewards_for_tests:hangs", reward_timeout_s=1000.0)
    path = os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])
    driver = subprocess.Popen(
        [sys.executable, "-m", "forerun.cli", "train", str(made)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    assert driver.stderr is not None
    assert driver.stderr.readline() == "a reward hangs\n"
    driver.send_signal(signal.SIGINT)
    started = time.perf_counter()
    assert driver.wait(timeout=60) == 130 and time.perf_counter() - started < 20.0
