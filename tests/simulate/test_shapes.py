"""Hardware and model tables: totals against published sizes, units, and what is said to a wrong name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.errors import UserError
from forerun.simulate.hardware import hardware_names, load_hardware, measure_cpu, peak_flops
from forerun.simulate.models import from_config, load_model, model_names


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
    for name in hardware_names():
        gpu = load_hardware(name)
        assert 1e14 < gpu.flops["bf16"] < 1e16
        assert 1e12 < gpu.memory_bytes_per_s < 2e13
        assert 5e10 < gpu.memory_bytes < 4e11
        assert all(latency_s < 1e-4 and 0 < share <= 1 for latency_s, share in gpu.all_reduce.values())
    assert load_hardware("h100_sxm") == load_hardware("H100")
    assert len(model_names()) >= 12


def test_the_cpu_is_measured() -> None:
    cpu = measure_cpu(size=256, repeats=1)
    assert 1e8 < cpu.flops["bf16"] < 1e14
    assert 1e8 < cpu.memory_bytes_per_s < 1e13


def test_import_is_fast_and_needs_no_torch() -> None:
    code = (
        "import time, sys; t = time.perf_counter(); import forerun.simulate.plan, forerun.simulate.validate; "
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules; print(time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
