"""How long the stochastic rounding of an update takes, per billion weights.

    python -m benchmarks.rounding [--millions 256] [--threads 1] [--device cpu] [--out FILE]

float32 masters of `--millions` weights are rounded to bfloat16, the median of five times; beside it the time that
copying them to bfloat16 takes (rounding to nearest).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from forerun.learner.optimizer import stochastic_bfloat16
from forerun.tracking.environment import describe_environment, machine_line

REPEATS = 5


def seconds(work: Callable[[], torch.Tensor]) -> float:
    """Median, waiting for the device."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()[-1:].item()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    masters = torch.randn(arguments.millions * 10**6, device=arguments.device) / 50
    billions = len(masters) / 1e9
    row = {
        "stochastic_s": seconds(lambda: stochastic_bfloat16(masters, 0)) / billions,
        "nearest_s": seconds(lambda: masters.bfloat16()) / billions,
    }
    environment = describe_environment()
    print(machine_line(environment))
    print(
        f"seconds per 1e9 weights on {arguments.device}, {arguments.threads} thread(s): stochastic "
        f"{row['stochastic_s']:.2f}, to nearest {row['nearest_s']:.2f}"
    )
    if arguments.out:
        settings = {"millions": arguments.millions, "threads": arguments.threads, "device": arguments.device}
        arguments.out.write_text(json.dumps({"environment": environment, **settings, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
