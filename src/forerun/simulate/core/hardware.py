"""Accelerators as the simulator sees them: peak rates, and the share of each peak that measured kernels reach.

Conventions: dense rates without sparsity; link rates are one direction per GPU; bytes, seconds and FLOP/s in SI units.
Every number and its source stands in `data/hardware.json`. A CPU is not in the table: it is measured, or estimated from
its cores. Left out: clocks, power, PCIe, int8 and fp4.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
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


@cache
def _table() -> dict[str, Any]:
    return json.loads((files("forerun.simulate.core") / "data" / "hardware.json").read_text())


def hardware_names() -> list[str]:
    """Names of the accelerators in the table."""
    return list(_table()["gpus"])


def load_hardware(name: str) -> Hardware:
    """Look an accelerator up by name, in any case, with or without its `_sxm` ending, or as a driver spells it.

    A driver's spelling ("NVIDIA H100 80GB HBM3") is recognised by the one word of it that the table knows.

    Raises:
        UserError: an unknown name, with the nearest one in the table.
    """
    table = _table()
    known = {key.lower(): key for key in table["gpus"]} | table["aliases"]
    key = known.get(name.lower().replace("-", "_").replace(" ", "_"))
    if key is None:
        words = {known[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in known}
        key = words.pop() if len(words) == 1 else None
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


def this_device() -> str:
    """Name of this machine's first accelerator as its driver spells it; "cpu" where no driver answers."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    names = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return names[0].strip() if names else "cpu"


# Rate of bfloat16 products over that of float32, by the instruction set that multiplies them.
BF16_GAIN = {"amx_bf16": 6.0, "avx512_bf16": 2.0, "bf16": 2.0}
EMULATED_BF16_GAIN = 0.3
CORE_FLOPS, CPU_BYTES_PER_S = 60e9, 14e9  # a float32 core and a small machine's memory, where nothing can be measured


def measure_cpu(repeats: int = 5) -> Hardware:
    """This machine's CPU, measured with numpy: float32 products of 64² matrices on one core, and a sweep over 40 MB.

    Products so small stay on one core, so that the rate, times the cores that this process may use, does not depend on
    what else runs; the machine is taken to be idle. The measured rates are what a kernel reaches, so all shares are 1.
    Takes about 0.1 s, most of it for fresh memory. A CPU whose cache holds 40 MB shows the rate of its cache. The rate
    in bfloat16, which numpy does not multiply, is the float32 rate times `BF16_GAIN`.
    """
    matrices = np.ones((256, 64, 64), dtype=np.float32)
    vector = np.ones(10_000_000, dtype=np.float32)
    product_s = min(_timed(lambda: matrices @ matrices) for _ in range(repeats))
    sweep_s = min(_timed(vector.sum) for _ in range(repeats))
    core_flops = 2.0 * 64 * matrices.size / product_s
    return cpu(usable_threads() * core_flops, vector.nbytes / sweep_s, cpu_flags())


def usable_threads() -> int:
    """Cores that this process may run on, or fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit))) if limit.isdigit() else cores


def nominal_cpu(cores: int, flags: Collection[str], memory_gib: float | None = None) -> Hardware:
    """A CPU that cannot be measured here, as `env.json` of a run describes it: rates from its cores and flags."""
    return cpu(cores * CORE_FLOPS, CPU_BYTES_PER_S, flags, (memory_gib or 16.0) * 2**30)


def cpu(flops: float, bytes_per_s: float, flags: Collection[str], memory_bytes: float | None = None) -> Hardware:
    """A CPU of a float32 rate in FLOP/s and a memory rate in bytes/s; `memory_bytes` None asks this machine."""
    gain = max((BF16_GAIN[flag] for flag in flags if flag in BF16_GAIN), default=EMULATED_BF16_GAIN)
    fit = GemmFit(overhead_s=10e-6, compute_share=1.0, bandwidth_share=1.0)
    return Hardware(
        name="CPU",
        flops={"fp32": flops, "bf16": gain * flops},
        memory_bytes=memory_bytes or _memory_bytes(),
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


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux lists them; empty on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(listed.partition(":")[2].split())


def _memory_bytes() -> float:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 16e9
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s
