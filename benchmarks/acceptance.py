"""Tokens per round of the quickstart's drafter by acceptance rule and proposal, on the same prompts at T = 1.

    python -m benchmarks.acceptance [--prompts 64] [--samples 2] [--temperatures 0.4,0.6,0.8,1.25,auto] [--out FILE]

Argmax drafts (one-hot q), token rejection and block verification of sampled drafts, and block verification at each
draft temperature. The standard error is over prompts. Acceptance does not depend on the machine.
Token and block verification are also compared on the very same drafts: their expected numbers of accepted tokens given
draft, p and q, integrated over the uniforms. That difference has a far smaller error than two runs have.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import difference, load_setting, mean_of, tokens_per_round, write_result
from forerun.acceptance.chain import (
    Acceptance,
    Target,
    block_threshold,
    clipped_products,
    drafted,
    residual_mass,
    token_acceptance,
    verify,
)
from forerun.config import SpeculationConfig
from forerun.drafters import load_drafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.models import Policy
from forerun.tracking.environment import describe_environment, machine_line
from forerun.types import Draft, VerifyInput, VerifyResult


def measure(
    policy: Policy, speculation: SpeculationConfig, prompts: list[list[int]], sampling: Sampling, n: int, slots: int
) -> dict[str, Any]:
    """One row of the table."""
    drafter = load_drafter(policy, speculation)
    engine = LocalEngine(policy, drafter, k=speculation.tokens, rule=speculation.verify, slots=slots)
    found = mean_of(tokens_per_round(list(engine.stream(prompts, sampling, n))))
    return {
        "proposal": speculation.proposal, "rule": speculation.verify, "temperature": speculation.draft_temperature,
        "tokens_per_round": found.mean, "stderr": found.stderr, "per_position": engine.counters.acceptance_per_position,
    }  # fmt: skip


@dataclass
class Expected:
    """In the place of the engine's verifier: notes what each rule would accept of every draft in the mean."""

    token: list[float] = field(default_factory=list)  # one entry per sequence and round
    block: list[float] = field(default_factory=list)

    def __call__(self, rule: str, inputs: VerifyInput) -> VerifyResult:
        verify(self._note, inputs)
        return verify(rule, inputs)

    def _note(self, target: Target, draft: Draft, log_ratio: Tensor, uniforms: Tensor) -> Acceptance:
        """Token: sum over i of prod_{j<=i} min(1, p_j/q_j). Block: P(tau >= i) = 1 - prod_{j>=i} (1 - h_j)."""
        stays = drafted(draft)
        token = (log_ratio.clamp(max=0.0).exp() * stays).cumprod(1).sum(1)
        prefix = clipped_products(log_ratio).exp()
        sequences, slots = (stays & (torch.arange(1, stays.shape[1] + 1) < draft.lengths[:, None])).nonzero(
            as_tuple=True
        )
        mass = residual_mass(target, draft, prefix[sequences, slots], sequences, slots + 1)
        h = prefix.index_put((sequences, slots), block_threshold(mass, prefix[sequences, slots])) * stays
        fails = (1 - h).flip(1).cumprod(1).flip(1)
        block = ((1 - fails) * stays).sum(1)
        some = draft.lengths > 0
        self.token += token[some].tolist()
        self.block += block[some].tolist()
        return token_acceptance(target, draft, log_ratio, uniforms)


def paired(
    policy: Policy, speculation: SpeculationConfig, prompts: list[list[int]], sampling: Sampling, n: int, slots: int
) -> dict[str, float]:
    """Expected accepted tokens of both rules on the drafts of one run under the token rule."""
    drafter, judge = load_drafter(policy, speculation), Expected()
    engine = LocalEngine(policy, drafter, k=speculation.tokens, rule="token", slots=slots, verifier=judge)
    list(engine.stream(prompts, sampling, n))
    gain = difference(judge.block, judge.token)
    return {
        "rounds": len(judge.token), "token": mean_of(judge.token).mean, "block": mean_of(judge.block).mean,
        "block_minus_token": gain.mean, "stderr": gain.stderr,
    }  # fmt: skip


def variants(speculation: SpeculationConfig, temperatures: list[float | str]) -> list[SpeculationConfig]:
    """Argmax, token and block at temperature 1, and block at every other."""
    changes: list[dict[str, Any]] = [
        {"proposal": "argmax", "verify": "token"},
        {"verify": "token"},
        {"verify": "block"},
    ]
    changes += [{"verify": "block", "draft_temperature": temperature} for temperature in temperatures]
    return [speculation.model_copy(update={"draft_temperature": 1.0, **change}) for change in changes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--temperatures", default="0.4,0.6,0.8,1.25,auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    setting = load_setting(arguments.recipe)
    recipe, policy, prompts = setting.recipe, setting.policy, setting.held_out(arguments.prompts)
    sampling = Sampling(recipe.rollout.max_new_tokens, 1.0, 1)
    machine = machine_line(describe_environment())
    print(f"{recipe.name}: k = {recipe.speculation.tokens}, {len(prompts)} prompts; {machine}")
    rows = []
    for speculation in variants(
        recipe.speculation, [h if h == "auto" else float(h) for h in arguments.temperatures.split(",")]
    ):
        row = measure(policy, speculation, prompts, sampling, arguments.samples, recipe.rollout.slots)
        rows.append(row)
        positions = " ".join(f"{a:.2f}" for a in row["per_position"])
        name = f"{row['proposal']:8} {row['rule']:6} temperature {row['temperature']!s:4}"
        print(f"{name}  {row['tokens_per_round']:.3f} ± {row['stderr']:.3f}  {positions}", flush=True)
    pairs = []
    for temperature in dict.fromkeys((1.0, recipe.speculation.draft_temperature)):
        speculation = recipe.speculation.model_copy(update={"draft_temperature": temperature})
        pair = paired(policy, speculation, prompts, sampling, arguments.samples, recipe.rollout.slots)
        pairs.append({"temperature": temperature, **pair})
        print(
            f"same drafts, temperature {temperature}, {pair['rounds']} rounds: token accepts {pair['token']:.4f}, "
            f"block {pair['block']:.4f}, difference {pair['block_minus_token']:+.5f} ± {pair['stderr']:.5f}"
        )
    write_result(arguments.out, "acceptance", recipe, {"rows": rows, "same_drafts": pairs})


if __name__ == "__main__":
    main()
