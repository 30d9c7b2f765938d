"""The GPU benchmark at toy sizes on the CPU: what it counts, what it leaves out and says so, and when it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import gpu, gpu_shapes
from benchmarks.gpu_shapes import QWEN3_8B, TOY, Cell, Models, Watch
from forerun.acceptance.chain import verify
from forerun.types import Draft, VerifyInput

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models() -> Models:
    return gpu_shapes.make_models(TOY, "cpu")


@pytest.fixture(scope="module")
def paper_models() -> Models:
    """The 8B shape without any memory."""
    return gpu_shapes.make_models(QWEN3_8B, "meta")


def command(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command wrote."""
    out = tmp_path / "results" / "gpu.json"
    gpu.main(["--toy", "--out", str(out), *arguments])
    return json.loads(out.read_text())


def test_without_a_gpu_it_says_so() -> None:
    results = ROOT / "benchmarks" / "results"
    before = sorted(results.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, gpu.NO_GPU, "")
    assert sorted(results.iterdir()) == before


def test_every_case_has_a_row_for_every_k(tmp_path: Path) -> None:
    data = command(tmp_path)
    assert (data["benchmark"], data["schema"], data["toy"]) == ("gpu", 1, True)
    device = data["device"]
    assert device["name"] == "cpu" and device["torch"] == torch.__version__ and device["copy_bytes_per_s"] > 0
    assert {"cuda", "driver", "memory_bytes", "peak_bytes_per_s", "peak_source"} <= device.keys()
    rounds = data["rounds"]
    assert rounds["skipped"] == rounds["not_reached"] == [] and rounds["dtype"] == "float32"
    found = [(row["batch"], row["context"], row["k"]) for row in rounds["cells"]]
    assert found == [(*case, k) for case in TOY.cases for k in (0, *TOY.ks)]
    for row in rounds["cells"]:
        parts = row["forward_s"] + row["verify_s"] + row["draft_s"]
        low, high = row["round_cost_range"]
        assert parts > 0 and 0 < low <= row["round_cost"] <= high
        assert (row["draft_s"] > 0) == (row["k"] > 0)
        for length, speedup in row["speedup_at_acceptance_length"].items():
            assert float(length) <= row["k"] + 1 and speedup == pytest.approx(float(length) / row["round_cost"])
    assert data["quickstart"] == {"skipped": gpu.load_quickstart(None)[1]}


def test_cases_that_do_not_fit_are_skipped_with_the_reason(tmp_path: Path) -> None:
    rounds = command(tmp_path, "--memory-gb", "0.0001")["rounds"]
    assert {(row["batch"], row["context"]) for row in rounds["cells"]} == {(1, 32)}
    assert [(row["batch"], row["context"]) for row in rounds["skipped"]] == [(4, 32), (2, 96)]
    assert rounds["skipped"][0]["reason"].startswith("4 rows of 32 tokens need 0.00015")
    assert rounds["skipped"][0]["reason"].endswith("9.5e-05 GB are free")
    assert rounds["not_reached"] == []


def test_what_the_time_does_not_reach_is_listed(tmp_path: Path) -> None:
    rounds = command(tmp_path, "--minutes", "0")["rounds"]
    assert rounds["cells"] == [] and rounds["not_reached"] == gpu_shapes.cases_text(TOY.cases)


def test_a_case_is_broken_off_between_turns(models: Models) -> None:
    checks = iter(range(3))

    def check() -> None:
        if next(checks, None) is None:
            raise gpu.OutOfTime

    class Ending(gpu.Clock):
        """A clock that lets three checks pass."""

        def check(self) -> None:
            check()

    section: dict[str, Any] = {"cells": [], "skipped": [], "not_reached": []}
    rounds = gpu.Rounds(section, lambda: None, None, None, list(TOY.cases))
    rounds.run(models, "cpu", Ending.of(1e6))
    assert section["cells"] == [] and rounds.todo == list(TOY.cases)
    rounds.run(models, "cpu", gpu.Clock.of(1e6))  # and can be taken up again
    assert len(section["cells"]) == 9 and rounds.todo == [] == section["not_reached"]


def test_round_cost_is_a_ratio_of_the_same_turn(models: Models) -> None:
    def cell(k: int, *seconds: float) -> Cell:
        parts = [{"forward_s": s / 2} for s in seconds]
        return Cell(k, None, Watch(False), list(seconds), parts)  # type: ignore[arg-type]

    plain, read = cell(0, 1.0, 2.0, 4.0), gpu_shapes.round_bytes(models, 1, 32, 0)
    same = gpu_shapes._row(models, (1, 32), plain, cell(0, 1.0, 2.0, 4.0), peak=read / 0.5)
    assert same["round_cost"] == 1.0 and same["round_s"] == 2.0 and same["forward_s"] == 1.0
    assert same["floor_s"] == pytest.approx(0.5) and same["bandwidth_share"] == pytest.approx(0.25)
    drafted = gpu_shapes._row(models, (1, 32), plain, cell(3, 1.5, 5.0, 5.0), peak=None)
    assert drafted["round_cost"] == 1.5 and drafted["round_cost_range"] == [1.25, 2.5]
    assert drafted["speedup_at_acceptance_length"]["3.0"] == 2.0 and drafted["bandwidth_share"] is None


def test_a_turn_is_rounds_of_the_engine(models: Models) -> None:
    cells = gpu_shapes.make_cells(models, (4, 32))
    for cell in cells:
        cell.turn((4, 32), 2, keep=True)
        counters = cell.engine.counters
        assert counters.rows == 8 and counters.drafted == 8 * cell.k
        assert 8 <= counters.tokens <= 8 * (cell.k + 1)
        assert set(cell.parts[0]) == {"forward_s", "verify_s", *(["draft_s"] if cell.k else [])}
        assert sum(cell.parts[0].values()) < cell.round_s[0]
    caches = {id(cell.engine._cache) for cell in cells}
    assert len(caches) == 1 and cells[0].engine._cache.positions >= 32 + 2 * (max(TOY.ks) + 1)


def test_synthetic_counts_stand_for_the_real_ones() -> None:
    torch.manual_seed(0)
    logits, draft = torch.randn(3, 3, 11), Draft(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 2, 2]))
    rate = gpu_shapes.ACCEPTANCE_RATE
    uniforms = torch.tensor([[rate / 2, rate / 2], [rate / 2, 0.99], [0.99, rate / 2]], dtype=torch.float64)
    inputs = VerifyInput(logits, draft, torch.ones(3), uniforms, torch.full((3,), 0.5, dtype=torch.float64))
    verdict, real = gpu_shapes.synthetic("block", inputs), verify("block", inputs)
    assert verdict.accepted.tolist() == [2, 1, 0]
    assert verdict.tokens[0, :2].tolist() == [1, 2] and verdict.tokens[1, 0] == 3
    assert torch.equal(verdict.logprobs, real.logprobs), "the real verification must have run"
    assert verdict.tokens.shape == real.tokens.shape


def test_bytes_of_the_toy_by_hand(models: Models) -> None:
    attention, mlp, norms = 32 * (32 + 16 + 16) + 32 * 32, 3 * 32 * 48, 2 * 32 + 2 * 8
    policy = 3 * (attention + mlp + norms) + 32 + 160 * 32  # norm and output head; the embedding table is not read
    layer, cached = 64 * (32 + 16 + 16) + 32 * 32 + mlp + 3 * 32 + 32 + 40 * 32, 2 * 2 * 8
    plain = 4 * (policy + 2 * 10 * 3 * cached)
    assert gpu_shapes.round_bytes(models, 2, 10, 0) == plain
    assert gpu_shapes.round_bytes(models, 2, 10, 3) == plain + 4 * (3 * 32 * 32 + 3 * (layer + 2 * 10 * cached))


def test_the_8b_shape_is_an_8b_policy(paper_models: Models) -> None:
    weights = sum(p.numel() for p in paper_models.policy.model.parameters())
    assert 8.18e9 < weights < 8.20e9 and paper_models.policy.dtype == torch.bfloat16
    assert gpu_shapes.cache_bytes(paper_models) == (147456, 4096)
    table = 2 * 151936 * 4096
    assert gpu_shapes.round_bytes(paper_models, 64, 4096, 0) == 2 * weights - table + 64 * 4096 * 147456
    room = 0.95 * (80e9 - 2 * weights - 1e9)
    refused = [c for c in QWEN3_8B.cases if gpu_shapes.refusal(gpu_shapes.case_bytes(paper_models, c), room, c)]
    assert refused == [(128, 4096), (256, 4096)]
    assert {b for b, _ in QWEN3_8B.cases} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert len(QWEN3_8B.cases) == len(set(QWEN3_8B.cases)) == 18


def test_peak_bandwidth_is_the_tables() -> None:
    assert gpu.peak_bandwidth("NVIDIA H100 80GB HBM3")[0] == 3.35e12
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090"):
        peak, why = gpu.peak_bandwidth(other)
        assert peak is None and other in why


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> str:
    """Sums for a tiny policy, without a drafter of its own."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl")},
        "draft": {"rollouts": 8, "epochs": 1, "vocab": 16, "depth": 2},
        "rollout": {"max_new_tokens": 8},
        "train": {"samples_per_prompt": 4},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    return str(tmp_path / "tiny.yaml")


def test_drafters_are_trained_and_measured_on_the_spot(recipe: str, tmp_path: Path) -> None:
    data = command(tmp_path, "--recipe", recipe, "--batches", "2,1")
    found = data["quickstart"]
    names = ["eagle3 trained here", "mtp trained here", "ngram"]
    assert [(row["drafter"], row["batch"]) for row in found["rows"]] == [(n, b) for n in names for b in (2, 1)]
    assert found["not_reached"] == [] and set(found["training"]) == {"eagle3", "mtp"}
    for row in found["rows"]:
        assert row["speedup"] > 0 and 1 <= row["acceptance_length"] <= row["k"] + 1 == 4
    assert len(data["rounds"]["cells"]) == 9
    assert "does not speculate" in data["engines"]["skipped"] or "vLLM is not installed" in data["engines"]["skipped"]


def test_the_quickstart_keeps_the_time_too(recipe: str, tmp_path: Path) -> None:
    found = command(tmp_path, "--recipe", recipe, "--batches", "2,1", "--minutes", "0")["quickstart"]
    assert found["rows"] == [] and found["training"] == {}
    assert len(found["not_reached"]) == 6 and all(row["reason"] for row in found["not_reached"])


def test_a_missing_policy_is_said(tmp_path: Path) -> None:
    found = command(tmp_path, "--minutes", "0", "--recipe", "no-such-recipe")["quickstart"]
    assert "no-such-recipe" in found["skipped"]


def test_rounds_need_torch_and_transformers_alone(tmp_path: Path) -> None:
    names = ("pydantic", "peft", "datasets", "math_verify", "plotly", "scipy", "rich", "typer")
    out = tmp_path / "gpu.json"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
        f"from benchmarks import gpu; gpu.main(['--toy', '--recipe', 'quickstart', '--out', {str(out)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    data = json.loads(out.read_text())
    assert len(data["rounds"]["cells"]) == 9 and "pydantic" in data["quickstart"]["skipped"]
