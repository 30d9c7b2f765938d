"""Accelerators and CPUs: peak rates, and the share of each peak that measured kernels reach.

Dense rates without sparsity; link rates are one direction per GPU; bytes, seconds and FLOP/s in SI units. Numbers and
sources are in `data/hardware.json`. A CPU is not in the table: it is measured, or estimated from its cores.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from forerun.errors import UserError
from forerun.simulate.core.tables import load_table, nearest
from forerun.tracking.environment import cpu_flags, memory_bytes, usable_threads


@dataclass(frozen=True, slots=True)
class GemmFit:
    """How far a matrix product stays below the roofline: a fixed overhead and the reachable shares of both peaks."""

    overhead_s: float
    compute_share: float
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator or CPU. `flops` and `gemm` are keyed by the precision of the weights ("bf16", "fp8", "fp32")."""

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


def load_hardware(name: str) -> Hardware:
    """Look an accelerator up by name, in any case, with or without its `_sxm` ending, or as a driver spells it.

    Of a driver's spelling ("NVIDIA H100 80GB HBM3") the one part that the table knows counts.

    Raises:
        UserError: an unknown name, with the nearest one in the table.
    """
    table = load_table("hardware")
    known = {key.lower(): key for key in table["gpus"]} | table["aliases"]
    key = known.get(name.lower().replace("-", "_").replace(" ", "_"))
    if key is None:
        parts = {known[part] for part in re.split(r"[^a-z0-9]+", name.lower()) if part in known}
        key = parts.pop() if len(parts) == 1 else None
    if key is None:
        near = known[nearest(name.lower(), known)]
        raise UserError(f"No accelerator is called {name!r}; the nearest is {near!r} of {', '.join(table['gpus'])}.")
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
    """Peak FLOP/s for weights of a precision. Raises UserError when the accelerator has no such unit."""
    if precision not in gpu.flops:
        raise UserError(
            f"{gpu.name} does not multiply in {precision!r}; set precision to one it does: {' or '.join(gpu.flops)}."
        )
    return gpu.flops[precision]


# Rate of bfloat16 products over that of float32, by the instruction set that multiplies them.
BF16_GAIN = {"amx_bf16": 6.0, "avx512_bf16": 2.0, "bf16": 2.0}
EMULATED_BF16_GAIN = 0.3
CORE_FLOPS = 60e9  # a float32 core, where nothing can be measured
CPU_BYTES_PER_S = 14e9  # a small machine's memory, likewise
CPU_MEMORY_GIB = 16.0
# Shares of the measured peaks that a small engine reaches. From SmolLM2-135M on two CPUs (float32 on AVX2, bfloat16 on
# AVX512): weights stream at 10-13 of 14-16 GB/s, products of 64 rows and more reach 0.7-0.9 of the measured rate.
CPU_BANDWIDTH_SHARE = 0.75
CPU_COMPUTE_SHARE = 0.8


def measure_cpu(repeats: int = 5) -> Hardware:
    """This machine's CPU, measured with numpy in about 0.1 s: float32 products of 64² matrices, and a sweep over 40 MB.

    Products so small stay on one core; their rate times the usable cores takes the machine to be idle. A CPU whose
    cache holds 40 MB shows the rate of its cache.
    """
    matrices = np.ones((256, 64, 64), dtype=np.float32)
    vector = np.ones(10_000_000, dtype=np.float32)
    product_s = min(_timed(lambda: matrices @ matrices) for _ in range(repeats))
    sweep_s = min(_timed(vector.sum) for _ in range(repeats))
    core_flops = 2.0 * 64 * matrices.size / product_s
    return cpu(usable_threads() * core_flops, vector.nbytes / sweep_s, cpu_flags())


def nominal_cpu(cores: int, flags: Collection[str], memory_gib: float | None = None) -> Hardware:
    """A CPU that cannot be measured here, as `env.json` of a run describes it: rates from its cores and flags."""
    return cpu(cores * CORE_FLOPS, CPU_BYTES_PER_S, flags, (memory_gib or CPU_MEMORY_GIB) * 2**30)


def cpu(flops: float, bytes_per_s: float, flags: Collection[str], memory: float | None = None) -> Hardware:
    """A CPU of a float32 rate in FLOP/s and a memory rate in bytes/s; `memory` in bytes, None: this machine's.

    The bfloat16 rate is the float32 rate times `BF16_GAIN` of the best of its `flags`.
    """
    gain = max((BF16_GAIN[flag] for flag in flags if flag in BF16_GAIN), default=EMULATED_BF16_GAIN)
    fit = GemmFit(overhead_s=10e-6, compute_share=CPU_COMPUTE_SHARE, bandwidth_share=CPU_BANDWIDTH_SHARE)
    return Hardware(
        name="CPU",
        flops={"fp32": flops, "bf16": gain * flops},
        memory_bytes=float(memory or memory_bytes() or CPU_MEMORY_GIB * 2**30),
        memory_bytes_per_s=bytes_per_s,
        link_bytes_per_s=bytes_per_s,
        link_domain=1,
        network_bytes_per_s=bytes_per_s,
        gemm={"fp32": fit, "bf16": fit},
        attention_overhead_s=10e-6,
        attention_bandwidth_share=1.0,
        prefill_flops_share=1.0,
        all_reduce={2: (0.0, 1.0)},
    )


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s
