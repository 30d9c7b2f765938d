"""Rollouts with rewards: for a training step, for held-out evaluation, and plainly beside a speculative step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from forerun.engine import Counters, RolloutEngine, Sampling
from forerun.engine.base import nothing
from forerun.errors import Interrupted
from forerun.models import Policy
from forerun.report.console import Console
from forerun.tasks import Problem, Task
from forerun.types import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class Generated:
    """n rollouts of each prompt, in order, with their texts and rewards."""

    rollouts: list[Rollout]
    texts: list[str]
    rewards: torch.Tensor  # [P, n]
    engine_s: float  # the engine alone
    reward_s: float
    counters: Counters  # of this call
    timeline: list[tuple[float, int]]

    @property
    def tokens(self) -> int:
        return sum(len(r.tokens) for r in self.rollouts)


def generate(
    engine: RolloutEngine,
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    n: int,
    console: Console,
    stop_requested: Callable[[], bool] = lambda: False,
    between: Callable[[], None] = nothing,
) -> Generated:
    """Sample every prompt n times and score the texts; `between` two rounds, see `RolloutEngine.stream`.

    Raises:
        Interrupted: `stop_requested` between two rollouts.
    """
    rollouts: list[Rollout] = []
    before, started, tokens = engine.counters.copy(), time.perf_counter(), 0
    for rollout in engine.stream([p.token_ids for p in prompts], sampling, n, between=between):
        rollouts.append(rollout)
        tokens += len(rollout.tokens)
        if stop_requested():
            raise Interrupted
        console.progress(len(rollouts), len(prompts) * n, "rollouts", len(rollouts) / (time.perf_counter() - started))
    engine_s, scored_at = time.perf_counter() - started, time.perf_counter()
    rollouts.sort(key=lambda r: (r.prompt_index, r.sample_index))
    texts = [policy.tokenizer.decode(r.tokens, skip_special_tokens=True) for r in rollouts]
    rewards = torch.tensor([task.reward(problems[r.prompt_index], t) for r, t in zip(rollouts, texts, strict=True)])
    return Generated(
        rollouts,
        texts,
        rewards.view(len(prompts), n),
        engine_s,
        time.perf_counter() - scored_at,
        engine.counters.minus(before),
        list(engine.timeline),
    )


def evaluation(generated: Generated) -> dict[str, float]:
    """Mean reward on held-out prompts with its standard error over prompts, and the answers' lengths."""
    per_prompt = generated.rewards.float().mean(dim=1)
    error = float(per_prompt.std() / len(per_prompt) ** 0.5) if len(per_prompt) > 1 else 0.0
    return {
        "eval/reward": float(per_prompt.mean()),
        "eval/stderr": error,
        "eval/length": generated.tokens / len(generated.rollouts),
        "eval/truncated": truncated_share(generated.rollouts),
        "eval/prompts": float(len(per_prompt)),
        "time/eval": generated.engine_s + generated.reward_s,
    }


def comparison(step: int, plain: Generated, speculative: Generated) -> dict[str, Any]:
    """The same prompts generated both ways in one run. Seconds are the engine's alone."""
    rates = [g.tokens / g.engine_s for g in (plain, speculative)]
    return {
        "step": step,
        "plain_s": plain.engine_s,
        "spec_s": speculative.engine_s,
        "plain_tokens": plain.tokens,
        "spec_tokens": speculative.tokens,
        "plain_tokens_per_s": rates[0],
        "spec_tokens_per_s": rates[1],
        "speedup": plain.engine_s / speculative.engine_s,
    }


def rollout_metrics(generated: Generated) -> dict[str, float | None]:
    """Rewards, lengths, throughput and acceptance of a training step."""
    rewards, counters = generated.rewards.float(), generated.counters
    lengths = torch.tensor([float(len(r.tokens)) for r in generated.rollouts])
    metrics: dict[str, float | None] = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_std_groups": float((rewards.amax(1) == rewards.amin(1)).float().mean()),
        "length/mean": float(lengths.mean()),
        "length/p95": float(lengths.quantile(0.95)),
        "length/max": float(lengths.max()),
        "length/truncated": truncated_share(generated.rollouts),
        "length/prompt_mean": sum(len(r.prompt_ids) for r in generated.rollouts) / len(generated.rollouts),
        "perf/gen_tokens": float(generated.tokens),
        "perf/gen_tokens_per_s": generated.tokens / generated.engine_s,
        "time/reward": generated.reward_s,
    }
    if counters.rounds:
        metrics |= {
            "spec/acceptance_length": counters.acceptance_length,
            "spec/acceptance_rate": sum(counters.accepted_at) / counters.drafted,
            "spec/k_mean": counters.k_mean,
            "spec/rounds": float(counters.rounds),
        }
        metrics |= {f"spec/acceptance_pos_{i + 1}": a for i, a in enumerate(counters.acceptance_per_position)}
    return metrics


def truncated_share(rollouts: Sequence[Rollout]) -> float:
    """Share of rollouts that ended at a limit and not by themselves."""
    return sum(r.finish_reason in ("length", "context") for r in rollouts) / len(rollouts)
