"""How fast the weights' checksum reads a tensor, on one thread or on a GPU.

    python -m benchmarks.checksum [--mib 1024] [--threads 1] [--device cpu] [--out FILE]

A bfloat16 tensor of `--mib`; the median of seven passes over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from forerun.models.checksum import checksum
from forerun.tracking.environment import describe_environment, machine_line

REPEATS = 7


def seconds(values: torch.Tensor) -> float:
    """Median of a checksum, which waits for the device."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        checksum({"weight": values})
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    values = torch.randn(arguments.mib * 2**19, dtype=torch.bfloat16, device=arguments.device)
    rate = arguments.mib * 2**20 / seconds(values) / 1e9
    environment = describe_environment()
    print(machine_line(environment))
    print(f"{arguments.mib} MiB on {arguments.device}, {arguments.threads} thread(s): {rate:.1f} GB/s")
    if arguments.out:
        row = {"mib": arguments.mib, "threads": arguments.threads, "device": arguments.device, "gb_per_s": rate}
        arguments.out.write_text(json.dumps({"environment": environment, **row}, indent=1))


if __name__ == "__main__":
    main()
