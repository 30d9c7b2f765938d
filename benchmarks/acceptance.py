"""Tokens per round of the quickstart's drafter by acceptance rule and proposal, on the same prompts at T = 1.

    python -m benchmarks.acceptance [--prompts 64] [--samples 2] [--heats 0.6,0.8,1.0,1.25] [--out FILE]

Argmax drafts (one-hot q), token rejection and block verification of sampled drafts, and block verification at each
draft temperature. The standard error is over prompts. Acceptance does not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from forerun.config import SpeculationConfig, load_recipe
from forerun.draft import load_drafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.loop.setup import encode
from forerun.models import Policy, load_policy
from forerun.records import Rollout
from forerun.report.environment import describe_environment, machine_line
from forerun.tasks import load_task


def tokens_per_round(rollouts: list[Rollout]) -> tuple[float, float]:
    """Mean over prompts of tokens per round, and its standard error."""
    prompts = sorted({r.prompt_index for r in rollouts})
    totals = {p: [0, 0] for p in prompts}
    for rollout in rollouts:
        totals[rollout.prompt_index][0] += len(rollout.tokens)
        totals[rollout.prompt_index][1] += rollout.rounds
    means = [tokens / rounds for tokens, rounds in totals.values()]
    return statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5


def measure(
    policy: Policy, speculation: SpeculationConfig, prompts: list[list[int]], sampling: Sampling, n: int, slots: int
) -> dict[str, Any]:
    """One row of the table."""
    drafter = load_drafter(policy, speculation)
    engine = LocalEngine(policy, drafter, k=speculation.tokens, rule=speculation.verify, slots=slots)
    mean, error = tokens_per_round(list(engine.stream(prompts, sampling, n)))
    return {
        "proposal": speculation.proposal, "rule": speculation.verify, "heat": speculation.draft_temperature,
        "tokens_per_round": mean, "stderr": error, "per_position": engine.counters.acceptance_per_position,
    }  # fmt: skip


def variants(speculation: SpeculationConfig, heats: list[float]) -> list[SpeculationConfig]:
    """Argmax, token and block at heat 1, and block at every other heat."""
    changes: list[dict[str, Any]] = [{"proposal": "argmax", "verify": "token"}, {"verify": "token"}, {}]
    changes += [{"draft_temperature": heat} for heat in heats if heat != 1.0]
    return [speculation.model_copy(update=change) for change in changes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--heats", default="0.6,0.8,1.0,1.25")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    policy = load_policy(recipe.policy.model, recipe.policy.dtype, recipe.policy.device, recipe.policy.adapter)
    problems = load_task(recipe.task, recipe.seed).problems("eval")[: arguments.prompts]
    prompts = [encode(p, recipe, policy).token_ids for p in problems]
    sampling = Sampling(recipe.rollout.max_new_tokens, 1.0, 1)
    environment = describe_environment()
    print(f"{recipe.name}: k = {recipe.speculation.tokens}, {len(prompts)} prompts; {machine_line(environment)}")
    rows = []
    for speculation in variants(recipe.speculation, [float(h) for h in arguments.heats.split(",")]):
        row = measure(policy, speculation, prompts, sampling, arguments.samples, recipe.rollout.slots)
        rows.append(row)
        positions = " ".join(f"{a:.2f}" for a in row["per_position"])
        name = f"{row['proposal']:8} {row['rule']:6} heat {row['heat']:.2f}"
        print(f"{name}  {row['tokens_per_round']:.3f} ± {row['stderr']:.3f}  {positions}", flush=True)
    if arguments.out:
        result = {"benchmark": "acceptance", "recipe": recipe.model_dump(mode="json"), "rows": rows}
        arguments.out.write_text(json.dumps({**result, "environment": environment}, indent=2) + "\n")


if __name__ == "__main__":
    main()
