"""Policies with recurrent layers, end to end: what the engine says of its samples is what the learner says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import forerun
from benchmarks.architectures import FAMILIES, build
from tiny_models import ALPHABET, tiny_tokenizer


@pytest.mark.parametrize("family", ["LFM2", "Qwen3-Next"])
def test_engine_and_learner_agree_on_a_recurrent_policy(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    config_class, changes = FAMILIES[family]
    policy = build(config_class, changes | {"vocab_size": len(ALPHABET), "eos_token_id": 0})
    policy.model.save_pretrained(tmp_path / "policy")
    tiny_tokenizer(ALPHABET).save_pretrained(tmp_path / "policy")
    rows = [{"question": f"{a}+{b}+{'1' * b}=", "answer": str(a)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    changed: dict[str, Any] = {
        "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tmp_path / "policy"), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "ngram", "k": 3, "ngram": {"prompt_lookup_min": 1}},
        "rollout": {"slots": 5, "max_new_tokens": 24},
        "train": {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 3, "learning_rate": 1e-3},
        "eval": {"every": 0, "prompts": 2},
        "checkpoint": {"every": 0},
    }
    recipe = tmp_path / "recurrent.yaml"
    recipe.write_text(json.dumps({"name": "recurrent", **changed}))
    summary = forerun.train(str(recipe))
    written = (Path(summary["run"]) / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, written) if "reward/mean" in line]
    assert len(steps) == 2 and all(step["policy/grad_norm"] > 0 for step in steps)
    assert all(step["mismatch/kl"] < 1e-6 and step["spec/k_mean"] > 0 for step in steps)
