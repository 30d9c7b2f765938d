"""Plain against speculative generation of the quickstart's policy, by batch and draft length, in one run.

    python -m benchmarks.speculation [--batches 1,8,16,32] [--ks 3,4,6] [--prompts 64] [--out FILE]

All prompts are sampled at the recipe's temperature with the recipe's limits, refilling slots as they free up, as a
training step does. Speed-up is in tokens per second; round cost is acceptance length over speed-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common import load_setting, write_result
from forerun.config import Recipe
from forerun.drafters import load_drafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.models import Policy
from forerun.tracking.environment import describe_environment, machine_line


def tokens_per_s(engine: LocalEngine, prompts: list[list[int]], recipe: Recipe, seed: int) -> float:
    """Throughput of sampling every prompt once."""
    sampling = Sampling(recipe.rollout.max_new_tokens, recipe.rollout.temperature, seed)
    started = time.perf_counter()
    tokens = sum(len(r.tokens) for r in engine.stream(prompts, sampling))
    return tokens / (time.perf_counter() - started)


def measure(
    policy: Policy, recipe: Recipe, prompts: list[list[int]], batch: int, ks: list[int], repeats: int
) -> list[dict[str, Any]]:
    """One row per k at one batch; plain and all k take turns."""
    engines = {0: LocalEngine(policy, slots=batch)}
    for k in ks:
        engines[k] = LocalEngine(policy, load_drafter(policy, recipe.speculation), k=k, slots=batch)
    rates: dict[int, list[float]] = {k: [] for k in engines}
    for turn in range(repeats + 1):
        for k, engine in engines.items():
            rate = tokens_per_s(engine, prompts, recipe, seed=turn)
            if turn:  # the first turn warms up
                rates[k].append(rate)
    plain = statistics.median(rates[0])
    rows = []
    for k in ks:
        counters, rate = engines[k].counters, statistics.median(rates[k])
        speedup = rate / plain
        length = counters.acceptance_length or 1.0
        rows.append(
            {
                "batch": batch, "k": k, "plain_tokens_per_s": plain, "tokens_per_s": rate, "speedup": speedup,
                "acceptance_length": length, "acceptance_per_position": counters.acceptance_per_position,
                "round_cost": length / speedup,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--batches", default="1,8,16,32")
    parser.add_argument("--ks", default="3,4,6")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    setting = load_setting(arguments.recipe)
    recipe, policy, prompts = setting.recipe, setting.policy, setting.held_out(arguments.prompts)
    machine = machine_line(describe_environment())
    print(f"{recipe.name}: {policy.name}, {policy.dtype}, T = {recipe.rollout.temperature}; {machine}")
    print("batch  k   plain    spec tokens/s  speed-up  tokens/round  round cost  by position")
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        some = prompts[: max(8, 2 * batch)]
        for row in measure(policy, recipe, some, batch, [int(k) for k in arguments.ks.split(",")], arguments.repeats):
            rows.append(row)
            positions = " ".join(f"{a:.2f}" for a in row["acceptance_per_position"])
            rates = f"{row['plain_tokens_per_s']:>7.0f} {row['tokens_per_s']:>7.0f}"
            costs = f"{row['acceptance_length']:>12.2f}  {row['round_cost']:>10.2f}"
            print(f"{batch:>5} {row['k']:>2} {rates}           {row['speedup']:>8.2f}  {costs}  {positions}")
    write_result(arguments.out, "speculation", recipe, {"rows": rows})


if __name__ == "__main__":
    main()
