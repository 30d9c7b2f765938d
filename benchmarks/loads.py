"""Versions of policy and drafter, one after the other, into vLLM: seconds per load, and whether memory grows.

    python -m benchmarks.loads [--versions 50] [--out FILE]

The recipe's drafter and its policy, whose first layer changes from version to version. The engine answers with the
checksums of what it took, which have to be those that were sent; after the last version it samples greedily, and the
local engine on the same weights has to give the same texts. Seconds hold the check and vLLM's taking over, not the
checksums of the sender. Memory is what the process holds (resident).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Setting, load_setting, options, plain_data, write_result
from forerun.drafters import Drafter, load_drafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.engine.vllm.adapter import Limits, VllmEngine
from forerun.models.auxiliary import decoder_layers
from forerun.tracking.environment import describe_environment, machine_line
from forerun.training.weights import pack_weights

GREEDY, PROMPTS = Sampling(24, 0.0, 0), 2  # of the texts that are compared


def resident_mib() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def measure(engine: VllmEngine, setting: Setting, drafter: Drafter, first: int, versions: int) -> dict[str, Any]:
    """Load `versions` versions, the first of them number `first`.

    Raises:
        SystemExit: the engine holds other bytes than were sent, or generates another policy's texts.
    """
    layer = list(decoder_layers(setting.policy.model)[0].parameters())
    seconds, memory = [], []
    for number in range(first, first + versions):
        for weight in layer:
            weight.data *= 1.002
        weights = pack_weights(number, setting.policy, drafter, shared=False)
        started = time.perf_counter()
        held = engine.load(weights)
        seconds.append(time.perf_counter() - started)
        memory.append(resident_mib())
        if (held.version, dict(held.checksums)) != (number, dict(weights.checksums)):
            sys.exit(f"version {number}: {dict(weights.checksums)} was sent, {dict(held.checksums)} is held")
    prompts = setting.held_out(PROMPTS)
    texts = [
        [r.tokens for r in sorted(e.stream(prompts, GREEDY), key=lambda r: r.prompt_index)]
        for e in (engine, LocalEngine(setting.policy, slots=PROMPTS))
    ]
    if texts[0] != texts[1]:
        sys.exit(f"after version {number} the engine's greedy texts are not those of the policy that was sent")
    return {
        "versions": versions, "seconds_median": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)], "memory_mib": memory,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """The row as it is shown."""
    memory, (least, most) = row["memory_mib"], row["seconds_range"]
    early, late = statistics.median(memory[:5]), statistics.median(memory[-5:])
    return (
        f"{row['versions']} versions, {row['seconds_median']:.2f} s a load "
        f"({least:.2f} to {most:.2f}), all checksums match; memory {early:.0f} MiB in the first five, "
        f"{late:.0f} MiB in the last five"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--versions", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    setting = load_setting(arguments.recipe)
    speculation = setting.recipe.speculation
    drafter = load_drafter(setting.policy, speculation)
    if drafter is None:
        sys.exit(f"The recipe '{setting.recipe.name}' does not speculate")
    engine = VllmEngine.from_live(setting.policy, drafter, speculation, limits=Limits(slots=8))
    size = sum(t.numel() * t.element_size() for s in (setting.policy.model, drafter) for t in s.state_dict().values())
    print(
        f"{setting.recipe.name}: {size / 2**20:.0f} MiB a version; {machine_line(describe_environment())}", flush=True
    )
    row = measure(engine, setting, drafter, 1, arguments.versions)
    print(line(row), flush=True)
    engine.close()
    result = {"arguments": plain_data(arguments), "bytes": size, "rows": [row]}
    write_result(arguments.out, "loads", setting.recipe, result)


if __name__ == "__main__":
    main()
