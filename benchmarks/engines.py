"""Both engines on the same policy: tokens/s plain and with the recipe's drafter, at several batches, in one run.

    python -m benchmarks.engines [--batches 1,8,32] [--max-new-tokens N] [--repeats 5] [--engines local,vllm]

A turn samples as many held-out prompts as the batch has slots (four at least), at the recipe's temperature, until they
end by themselves or at the limit: tokens over seconds, the emptying end included. The engines take turns; medians. One
engine per cell: with vLLM the start is not in the time. Both verify by token rejection, the rule that vLLM has
everywhere.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from typing import Any

from benchmarks.common import Setting, load_setting, options, plain_data, write_result
from forerun.config import RolloutConfig
from forerun.drafters import load_drafter
from forerun.engine import Counters, RolloutEngine, Sampling, build_engine
from forerun.tracking.environment import describe_environment, machine_line

FEWEST = 4  # prompts of a turn
CACHE_GIB = 2.0  # of each vLLM engine: two of them stand beside the local ones


def engine_of(setting: Setting, name: str, speculative: bool, slots: int) -> RolloutEngine:
    """One engine, plain or with the recipe's drafter."""
    speculation = setting.recipe.speculation.model_copy(update={"verify": "token"})
    drafter = load_drafter(setting.policy, speculation) if speculative else None
    if name == "local":
        return build_engine(RolloutConfig(slots=slots), setting.policy, drafter, speculation)
    from forerun.engine.vllm.adapter import Limits, VllmEngine

    block = speculation if speculative else None
    return VllmEngine.from_live(setting.policy, drafter, block, limits=Limits(slots=slots, cache_gib=CACHE_GIB))


def turn(engine: RolloutEngine, prompts: list[list[int]], sampling: Sampling) -> tuple[float, Counters]:
    """Tokens per second, and counters, of one call."""
    before, started = engine.counters.copy(), time.perf_counter()
    tokens = sum(len(r.tokens) for r in engine.stream(prompts, sampling))
    return tokens / (time.perf_counter() - started), engine.counters.minus(before)


def measure(setting: Setting, engines: list[str], batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row per engine at one batch: medians over turns of plain and speculative tokens/s, and their ratio."""
    prompts = setting.held_out(max(FEWEST, batch))
    cells = [(name, speculative) for name in engines for speculative in (False, True)]
    rates: dict[tuple[str, bool], list[float]] = {cell: [] for cell in cells}
    counters = dict.fromkeys(cells, Counters())
    with ExitStack() as stack:
        made = {cell: engine_of(setting, *cell, slots=batch) for cell in cells}
        for engine in made.values():
            stack.callback(engine.close)
        for number in range(repeats + 1):
            for cell in cells:
                sampling = Sampling(tokens, setting.recipe.rollout.temperature, number)
                rate, counted = turn(made[cell], prompts, sampling)
                if number:  # the first turn warms up
                    rates[cell].append(rate)
                    counters[cell] = counters[cell].plus(counted)
    return [row(name, batch, rates, counters[name, True]) for name in engines]


def row(name: str, batch: int, rates: dict[Any, list[float]], counted: Counters) -> dict[str, Any]:
    """What is shown and written of one engine at one batch."""
    plain, speculative = (statistics.median(rates[name, kind]) for kind in (False, True))
    return {
        "engine": name, "batch": batch, "plain_tokens_per_s": plain, "speculative_tokens_per_s": speculative,
        "speedup": speculative / plain, "acceptance_length": counted.acceptance_length,
        "acceptance_per_position": counted.acceptance_per_position,
        "turns": {"plain": rates[name, False], "speculative": rates[name, True]},
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """The row as it is shown."""
    rates = f"{row['plain_tokens_per_s']:>9.1f} {row['speculative_tokens_per_s']:>9.1f}"
    ratios = f"{row['speedup']:>5.2f}x  {row['acceptance_length']:.2f}"
    return f"{row['batch']:>5} {row['engine']:>7} {rates}           {ratios}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--engines", default="local,vllm")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    setting = load_setting(arguments.recipe)
    recipe, tokens = setting.recipe, arguments.max_new_tokens or setting.recipe.rollout.max_new_tokens
    speculation = recipe.speculation
    what = f"{setting.policy.dtype}, {speculation.method} k = {speculation.tokens}, at most {tokens} tokens each"
    print(f"{recipe.name}, {what}, T = {recipe.rollout.temperature}; {machine_line(describe_environment())}")
    print(f"{'batch':>5} {'engine':>7} {'plain':>9} {'spec':>9} tokens/s  {'ratio':>6}  tokens per round")
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        found = measure(setting, arguments.engines.split(","), batch, tokens, arguments.repeats)
        rows += found
        print(*map(line, found), sep="\n", flush=True)
    write_result(arguments.out, "engines", recipe, {"arguments": plain_data(arguments), "rows": rows})


if __name__ == "__main__":
    main()
