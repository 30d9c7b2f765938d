"""Accelerators as the simulator sees them: peak rates, and the share of each peak that measured kernels reach.

Conventions: dense rates without sparsity; link rates are one direction per GPU; bytes, seconds and FLOP/s in SI units.
Every number and its source stands in `data/hardware.json`. This machine's CPU is not in the table: it is measured.
Left out: clocks, power, PCIe, int8 and fp4.
"""

from __future__ import annotations

import difflib
import json
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from forerun.errors import UserError


@dataclass(frozen=True, slots=True)
class GemmFit:
    """How far a matrix product stays below the roofline: a fixed overhead and the reachable shares of both peaks."""

    overhead_s: float
    compute_share: float
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator. `flops` and `gemm` are keyed by the precision of the weights ("bf16", "fp8")."""

    name: str
    flops: dict[str, float]  # FLOP/s
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # NVLink, one direction
    link_domain: int  # GPUs that reach each other over NVLink
    network_bytes_per_s: float  # between NVLink domains, per GPU
    gemm: dict[str, GemmFit]
    attention_overhead_s: float
    attention_bandwidth_share: float
    prefill_flops_share: float
    all_reduce: dict[int, tuple[float, float]]  # group size: latency in seconds, share of one-way NVLink


@cache
def _table() -> dict[str, Any]:
    return json.loads((files("forerun.simulate") / "data" / "hardware.json").read_text())


def hardware_names() -> list[str]:
    """Names of the accelerators in the table."""
    return list(_table()["gpus"])


def load_hardware(name: str) -> Hardware:
    """Look an accelerator up by name, in any case, with or without its `_sxm` ending.

    Raises:
        UserError: an unknown name, with the nearest one in the table.
    """
    table = _table()
    known = {key.lower(): key for key in table["gpus"]} | table["aliases"]
    key = known.get(name.lower().replace("-", "_").replace(" ", "_"))
    if key is None:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
        raise UserError(
            f"No accelerator is called {name!r}; the nearest is {known[near[0]]!r} of {', '.join(hardware_names())}."
        )
    return _from_row(key, table["gpus"][key])


def _from_row(name: str, row: dict[str, Any]) -> Hardware:
    flops = {"bf16": row["bf16_tflops"] * 1e12} | ({"fp8": row["fp8_tflops"] * 1e12} if row["fp8_tflops"] else {})
    overhead_us, bandwidth_share, prefill_share = row["attention"]
    return Hardware(
        name=name,
        flops=flops,
        memory_bytes=row["hbm_gb"] * 1e9,
        memory_bytes_per_s=row["hbm_tb_s"] * 1e12,
        link_bytes_per_s=row["nvlink_gb_s"] * 1e9,
        link_domain=row["domain"],
        network_bytes_per_s=row["network_gb_s"] * 1e9,
        gemm={precision: GemmFit(fit[0] * 1e-6, fit[1], fit[2]) for precision, fit in row["gemm"].items()},
        attention_overhead_s=overhead_us * 1e-6,
        attention_bandwidth_share=bandwidth_share,
        prefill_flops_share=prefill_share,
        all_reduce={int(n): (fit[0] * 1e-6, fit[1]) for n, fit in row["all_reduce"].items()},
    )


def peak_flops(gpu: Hardware, precision: str) -> float:
    """Peak FLOP/s for weights of a precision.

    Raises:
        UserError: the accelerator has no such unit.
    """
    if precision not in gpu.flops:
        raise UserError(
            f"{gpu.name} does not multiply in {precision!r}; set precision to one it does: {' or '.join(gpu.flops)}."
        )
    return gpu.flops[precision]


def measure_cpu(size: int = 1024, repeats: int = 3, memory_bytes: float = 16e9) -> Hardware:
    """This machine's CPU, measured with numpy: a float32 product of `size`² matrices and a sweep over 64 MB.

    The measured rates are what a kernel reaches, so all shares are 1. Float32 stands under the name "bf16" because the
    local engine computes in float32 where the hardware has no bfloat16 unit.
    """
    matrix = np.ones((size, size), dtype=np.float32)
    vector = np.ones(16_000_000, dtype=np.float32)
    product_s = min(_timed(lambda: matrix @ matrix) for _ in range(repeats))
    sweep_s = min(_timed(vector.sum) for _ in range(repeats))
    bandwidth = vector.nbytes / sweep_s
    fit = GemmFit(overhead_s=10e-6, compute_share=1.0, bandwidth_share=1.0)
    flops = 2.0 * size**3 / product_s
    return Hardware(
        "CPU",
        {"bf16": flops},
        memory_bytes,
        bandwidth,
        bandwidth,
        1,
        bandwidth,
        {"bf16": fit},
        10e-6,
        1.0,
        1.0,
        {2: (0.0, 1.0)},
    )


def _timed(work: Any) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s
