"""`forerun bench` on a tiny policy: the table is whole, its parts fit together, and the simulator can read it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from command_line import run_here
from forerun.models import load_policy
from forerun.simulate.plan.cost_table import read_cost_table
from tiny_models import random_drafter


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    model = tiny("llama")
    random_drafter(load_policy(str(model), "float32", "cpu")).save(tmp_path / "drafter", {})
    data = {
        "name": "tiny",
        "policy": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "eval_path": str(tmp_path / "sums.jsonl")},
        "speculation": {"method": "eagle3", "draft": str(tmp_path / "drafter"), "k": 3},
        "rollout": {"max_new_tokens": 12},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def bench(recipe: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forerun.cli", "bench", str(recipe), "--json", "--repeats", "1", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_cell_is_measured_and_written(recipe: Path, tmp_path: Path) -> None:
    done = bench(recipe, "--ks", "1,2", "--batches", "1,4", "--methods", "eagle3,ngram", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    cells = [(row["method"], row["k"], row["batch"]) for row in result["rows"]]
    drafted = [(m, k) for m in ("eagle3", "ngram") for k in (1, 2)]
    assert cells == [(m, k, b) for b in (1, 4) for m, k in [("none", 0), *drafted]]
    for row in result["rows"]:
        assert row["draft_s"] + row["verify_s"] >= 0 and row["plain_step_s"] > 0 and row["speedup"] > 0
        assert 1 <= row["acceptance_length"] <= row["k"] + 1
    eagle = [row for row in result["rows"] if row["method"] == "eagle3"]
    assert all(row["draft_s"] > 0 and row["verify_s"] > 0 and row["drafter_bytes"] > 0 for row in eagle)
    table = read_cost_table(tmp_path / "out" / "bench.json")
    assert table.methods == ["eagle3", "ngram"] and set(table.acceptance("eagle3")) == {1, 2}
    assert "heat-eagle3" in (tmp_path / "out" / "bench.html").read_text()


def test_mistakes_are_one_sentence(recipe: Path) -> None:
    for words, sentence in (
        (("--ks", "0,2"), "no list of positive whole numbers"),
        (("--methods", "eagle3", "--draft", "eagle3=/nowhere"), "neither a folder nor a shipped artifact"),
        (("--methods", "gremlin"), "gremlin"),
    ):
        done = run_here("bench", str(recipe), "--json", "--repeats", "1", *words)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
