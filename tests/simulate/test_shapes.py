"""Hardware and model tables: totals against published sizes, units, and what is said to a wrong name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.errors import UserError
from forerun.simulate.core.hardware import (
    cpu,
    load_hardware,
    measure_cpu,
    nominal_cpu,
    peak_flops,
)
from forerun.simulate.core.shapes import from_config, load_model
from forerun.simulate.core.tables import load_table
from forerun.tracking.environment import accelerator_name, usable_threads


@pytest.mark.parametrize(
    ("name", "total", "active", "cache_bytes"),
    [
        ("Qwen3-0.6B", 0.596e9, 0.596e9, 114_688),
        ("Qwen3-8B", 8.19e9, 8.19e9, 147_456),
        ("Llama-3.1-8B", 8.03e9, 8.03e9, 131_072),
        ("Qwen3-32B", 32.76e9, 32.76e9, 262_144),
        ("Qwen3-30B-A3B", 30.5e9, 3.35e9, 98_304),
        ("Qwen3-235B-A22B", 235.1e9, 22.2e9, 192_512),
        ("DeepSeek-V3", 671e9, 37.6e9, 70_272),
    ],
)
def test_totals_follow_from_the_shapes(name: str, total: float, active: float, cache_bytes: int) -> None:
    model = load_model(name)
    assert model.params == pytest.approx(total, rel=0.005)
    assert model.active_params == pytest.approx(active, rel=0.005)
    assert model.cache_bytes_per_token() == cache_bytes


def test_a_config_file_gives_the_same_shape_as_the_table(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).params == load_model("Qwen/Qwen3-0.6B").params
    assert load_model(config).params == load_model("Qwen3-0.6B").params


def test_wrong_names_and_sizes_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="nearest is 'Qwen3-8B'"):
        load_model("Qwen3-9B")
    with pytest.raises(UserError, match="nearest is 'H100'"):
        load_hardware("H101")
    with pytest.raises(UserError, match="hidden_size=-4"):
        from_config("broken", {"hidden_size": -4, "num_attention_heads": 2})
    with pytest.raises(UserError, match="bf16"):
        peak_flops(load_hardware("A100"), "fp8")


def test_rates_are_in_si_units() -> None:
    for name in load_table("hardware")["gpus"]:
        gpu = load_hardware(name)
        assert 1e14 < gpu.flops["bf16"] < 1e16
        assert 1e12 < gpu.memory_bytes_per_s < 2e13
        assert 5e10 < gpu.memory_bytes < 4e11
        assert all(latency_s < 1e-4 and 0 < share <= 1 for latency_s, share in gpu.all_reduce.values())
    assert load_hardware("h100_sxm") == load_hardware("H100")
    assert len(load_table("models")["models"]) >= 12


def test_accelerators_are_found_by_the_names_that_drivers_give_them() -> None:
    for name, key in (
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA H200", "H200"),
    ):
        assert load_hardware(name).name == key
    with pytest.raises(UserError, match="No accelerator is called 'NVIDIA L40S'"):
        load_hardware("NVIDIA L40S")


def test_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_cpu(repeats=2)
    assert 1e8 < found.flops["fp32"] < 1e14
    assert 1e8 < found.memory_bytes_per_s < 1e13
    assert 1e8 < found.memory_bytes < 1e14
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert usable_threads() == 1


def test_bfloat16_on_a_cpu_follows_its_flags() -> None:
    plain, avx, amx = (cpu(1e11, 1e10, flags) for flags in ((), ("avx512_bf16",), ("avx512_bf16", "amx_bf16")))
    assert plain.flops["bf16"] < plain.flops["fp32"] < avx.flops["bf16"] < amx.flops["bf16"]
    assert nominal_cpu(4, ("avx2",), 8.0).flops["fp32"] == 2 * nominal_cpu(2, ("avx2",), 8.0).flops["fp32"]
    assert nominal_cpu(4, (), 8.0).memory_bytes == 8 * 2**30


def test_this_machine_s_accelerator_is_what_its_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert accelerator_name() is None
    for script, name in (("echo 'NVIDIA H100 80GB HBM3'", "NVIDIA H100 80GB HBM3"), ("exit 9", None)):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert accelerator_name() == name


def test_a_hub_model_that_was_downloaded_before_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "models--some--Model-2B" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 32}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert load_model("some/Model-2B").layers == 2
    with pytest.raises(UserError, match="No model shape is called 'other/Model-2B'"):
        load_model("other/Model-2B")
    with pytest.raises(UserError, match="holds no config"):
        load_model(tmp_path)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds list"):
        load_model(folder)


def test_import_is_fast_and_needs_numpy_alone() -> None:
    modules = ", ".join(
        f"forerun.simulate.{name}"
        for name in ("plan.planner", "validation.validate", "plan.recipe", "plan.predict", "plan.run")
    )
    code = (
        f"import time, sys; t = time.perf_counter(); import {modules}; "
        "names = {'torch', 'scipy', 'rich', 'pandas', 'yaml', 'pydantic', 'plotly', 'transformers'}; "
        "heavy = names & set(sys.modules); assert not heavy, heavy; print(time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
