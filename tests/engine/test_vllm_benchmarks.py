"""The benchmarks that compare both engines, at toy size. Skipped where vLLM is not installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import gpu, loads
from benchmarks.common import Setting, load_setting
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.engine import Weights
from forerun.models import Policy, load_policy
from vllm_tiny import needs_vllm

pytestmark = [needs_vllm, pytest.mark.slow]


@pytest.fixture
def setting(small: Policy, drafter: Eagle3Drafter, tmp_path: Path) -> Setting:
    """Sums for the tiny policy and its untrained head."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    drafter.save(tmp_path / "head", {})
    data = {
        "policy": {"model": small.name, "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl")},
        "speculation": {"method": "eagle3", "draft": str(tmp_path / "head"), "k": 2},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    return load_setting(str(tmp_path / "tiny.yaml"))


def test_both_engines_are_timed_at_every_batch(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "REPEATS", 1)
    document = gpu.Document(tmp_path / "gpu.json", {})
    gpu.run_engines(document, setting, gpu.Clock.of(600), tokens=6)
    section = json.loads((tmp_path / "gpu.json").read_text())["engines"]
    assert section["not_reached"] == []
    assert [(r["batch"], r["engine"]) for r in section["rows"]] == [
        (batch, name) for batch in gpu.ENGINE_BATCHES for name in ("local", "vllm")
    ]
    for row in section["rows"]:
        assert row["plain_tokens_per_s"] > 0 and 1 <= row["acceptance_length"] <= 3
        assert len(row["turns"]["plain"]) == len(row["turns"]["speculative"]) == 1


def test_what_the_time_leaves_out_is_said(setting: Setting, tmp_path: Path) -> None:
    document = gpu.Document(tmp_path / "gpu.json", {})
    gpu.run_engines(document, setting, gpu.Clock.of(0), tokens=6)
    assert document.data["engines"] == {"rows": [], "not_reached": list(gpu.ENGINE_BATCHES)}


def test_versions_are_loaded_and_compared(small: Policy, setting: Setting, fresh: Any, drafter: Eagle3Drafter) -> None:
    """A policy that differs from what was sent is noticed."""
    own = replace(setting, policy=load_policy(small.name, "float32", "cpu"))
    row = loads.measure(fresh, own, drafter, first=1, versions=3)
    assert fresh.metrics()["version"] == 3 and len(row["memory_mib"]) == 3 and "all checksums match" in loads.line(row)

    class Stale:
        def load(self, weights: Weights) -> Weights:
            return Weights(weights.version, {"policy": "0", "draft": "0"})

    with pytest.raises(SystemExit, match="was sent"):
        loads.measure(Stale(), own, drafter, first=4, versions=1)  # type: ignore[arg-type]
