"""Draft trees at batch 1: Graft against an EAGLE-3 tree of as many nodes, against the chain, and against no drafts.

    python -m benchmarks.trees [--nodes 12] [--chains 3,4] [--prompts 12] [--samples 1] [--repeats 3] [--out FILE]

All read the same EAGLE-3 head. `eagle` is the dynamic tree of full budget (EAGLE-2 and -3); `prune` stops it where the
head is unsure; `graft` fills what that frees from the adjacency table, `tail` does so below the deepest draft, and
`root` retrieves without pruning. Trees are judged by the target-only walk, chains by the recipe's rule, at T = 0 both
by the argmax. Held-out prompts, one after the other; all methods take each prompt in turn, so that a machine that is
busier for a while is so for all of them. The first pass over the prompts warms up and fills the table.

Tokens per round include the token that is not drafted; accepted drafts are one less. Their standard error is over
prompts. Tokens per second are the median over prompts and passes, speed-up is that of the ratios to plain decoding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.common import (
    Mean,
    Setting,
    difference,
    load_setting,
    mean_of,
    options,
    plain_data,
    tokens_per_round,
    write_result,
)
from forerun.config import GraftConfig, SpeculationConfig
from forerun.config.drafters import GRAFT_PRESETS
from forerun.drafters import load_drafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.tracking.environment import describe_environment, machine_line

VARIANTS = ("eagle", "prune", "graft", "tail", "root")
LARGE = 30  # nodes from which on the paper's shape is used


def graft_config(nodes: int, variant: str) -> GraftConfig:
    """The nearer preset at this budget; what stays at the checkpoints keeps its share of it."""
    preset = "paper" if nodes >= LARGE else "small"
    shape = GraftConfig.model_validate({"preset": preset})
    keep = [round(kept * nodes / shape.nodes) for kept in shape.keep]
    return GraftConfig.model_validate(
        {**GRAFT_PRESETS[preset], "preset": preset, "nodes": nodes, "keep": keep, "variant": variant}
    )


def methods(draft: str, rule: str, nodes: int, chains: Sequence[int], variants: Sequence[str]) -> dict[str, Any]:
    """Speculation blocks by the name of their row."""
    shared = {"draft": draft, "verify": rule}
    found = {f"chain k={k}": SpeculationConfig(method="eagle3", k=k, **shared) for k in chains}
    for variant in variants:
        found[f"{variant} {nodes}"] = SpeculationConfig(
            method="graft", k=nodes, graft=graft_config(nodes, variant), **shared
        )
    return found


@dataclass(slots=True)
class Cell:
    """One method at one temperature."""

    engine: LocalEngine
    prompts: int
    lengths: list[float] = field(default_factory=list)  # tokens per round, pass by pass and prompt by prompt
    rates: list[float] = field(default_factory=list)  # tokens per second, likewise

    def turn(self, prompt: list[int], sampling: Sampling, samples: int) -> None:
        """Sample a prompt."""
        before, started = self.engine.counters.copy(), time.perf_counter()
        rollouts = list(self.engine.stream([prompt], sampling, samples))
        seconds = time.perf_counter() - started
        self.lengths += tokens_per_round(rollouts)
        self.rates.append(self.engine.counters.minus(before).tokens / seconds)

    def forget(self) -> None:
        """What was measured so far was to warm up."""
        self.engine.counters = self.engine.counters.minus(self.engine.counters)
        self.lengths, self.rates = [], []

    @property
    def by_prompt(self) -> list[float]:
        """Tokens per round of every prompt, mean over the passes."""
        return [statistics.mean(self.lengths[place :: self.prompts]) for place in range(self.prompts)]


def cells_of(setting: Setting, blocks: dict[str, SpeculationConfig], prompts: int) -> dict[str, Cell]:
    """An engine for plain decoding and one for each block."""
    cells = {"plain": Cell(LocalEngine(setting.policy, slots=1), prompts)}
    for name, block in blocks.items():
        drafter = load_drafter(setting.policy, block)
        cells[name] = Cell(LocalEngine(setting.policy, drafter, k=block.tokens, rule=block.verify, slots=1), prompts)
    return cells


def measure(
    setting: Setting, blocks: dict[str, SpeculationConfig], prompts: list[list[int]], temperature: float,
    samples: int, repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per method at one temperature."""
    cells = cells_of(setting, blocks, len(prompts))
    for number in range(repeats + 1):
        for place, prompt in enumerate(prompts):
            sampling = setting.sampling(setting.recipe.seed + number * len(prompts) + place, temperature)
            for cell in cells.values():
                cell.turn(prompt, sampling, samples)
        if number == 0:
            for cell in cells.values():
                cell.forget()
    reference = next((name for name in cells if name.startswith("eagle")), None)
    rows = []
    for name, cell in cells.items():
        rows.append({"method": name, "temperature": temperature, **row(cell, cells["plain"])})
        if reference is not None:
            rows[-1]["minus_eagle"] = asdict(difference(cell.by_prompt, cells[reference].by_prompt))
    return rows


def row(cell: Cell, plain: Cell) -> dict[str, Any]:
    """Figures of one method."""
    counters = cell.engine.counters
    return {
        "tokens_per_round": asdict(mean_of(cell.by_prompt)), "by_prompt": cell.by_prompt,
        "nodes_mean": counters.k_mean or 0.0,
        "tokens_per_s": statistics.median(cell.rates), "tokens_per_s_each": cell.rates,
        "speedup": statistics.median(a / b for a, b in zip(cell.rates, plain.rates, strict=True)),
        "drafter": cell.engine.metrics()["drafter"],
    }  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of one temperature."""
    print(f"\nT = {rows[0]['temperature']:g}")
    print("method         tokens/round      minus eagle        nodes  tokens/s  speed-up")
    for r in rows:
        against = str(Mean(**r["minus_eagle"])) if "minus_eagle" in r else ""
        lengths = f"{r['method']:12}  {Mean(**r['tokens_per_round'])}  {against:>15}"
        print(f"{lengths}   {r['nodes_mean']:>6.1f}  {r['tokens_per_s']:>8.1f}  {r['speedup']:>8.2f}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--draft", help="EAGLE-3 head, folder or shipped artifact; default: the recipe's")
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--chains", default="3,4", help="draft lengths of the chains")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--samples", type=int, default=1, help="of a prompt in a pass")
    parser.add_argument("--repeats", type=int, default=3, help="passes that count")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    setting = load_setting(arguments.recipe, {"rollout.max_new_tokens": arguments.max_new_tokens})
    speculation, prompts = setting.recipe.speculation, setting.held_out(arguments.prompts)
    draft = arguments.draft or speculation.draft
    chains, variants = [int(k) for k in arguments.chains.split(",") if k], arguments.variants.split(",")
    blocks = methods(draft, speculation.verify, arguments.nodes, chains, variants)
    print(f"{setting.recipe.name}: batch 1, {len(prompts)} prompts; {machine_line(describe_environment())}")
    rows = []
    for temperature in map(float, arguments.temperatures.split(",")):
        found = measure(setting, blocks, prompts, temperature, arguments.samples, arguments.repeats)
        show(found)
        rows += found
    result = {
        "arguments": plain_data(arguments),
        "blocks": {name: block.model_dump(mode="json") for name, block in blocks.items()}, "rows": rows,
    }  # fmt: skip
    write_result(arguments.out, "trees", setting.recipe, result)


if __name__ == "__main__":
    main()
