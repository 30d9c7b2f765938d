"""Numbers of a step: what its rollouts were like, evaluation, comparison with plain generation, samples for the report.

Every name has its definition in `tracking/metrics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from forerun.models import Policy
from forerun.tasks.scoring import Score
from forerun.training.rollout import RolloutBatch
from forerun.types import Rollout

SAMPLES_KEPT = 16  # rollouts of a step that go into rollouts.jsonl


def rollout_metrics(batch: RolloutBatch) -> dict[str, float | None]:
    """Rewards, lengths, throughput and acceptance of a training step."""
    rewards = batch.rewards.float()
    lengths = torch.tensor([float(len(r.tokens)) for r in batch.rollouts])
    metrics: dict[str, float | None] = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_std_groups": float((rewards.amax(1) == rewards.amin(1)).float().mean()),
        "length/mean": float(lengths.mean()),
        "length/p95": float(lengths.quantile(0.95)),
        "length/max": float(lengths.max()),
        "length/truncated": truncated_share(batch.rollouts),
        "length/prompt_mean": sum(len(r.prompt_ids) for r in batch.rollouts) / len(batch.rollouts),
        "perf/gen_tokens": float(batch.tokens),
        "perf/gen_tokens_per_s": batch.tokens / batch.engine_s,
        "time/reward": batch.reward_s,
    }
    return metrics | reward_metrics(batch.scores) | acceptance_metrics(batch)


def reward_metrics(scores: Sequence[Score]) -> dict[str, float | None]:
    """What was not computed, and the means of the named parts; a completion without a part counts 0."""
    names = dict.fromkeys(name for score in scores for name in score.parts)
    means: dict[str, float | None]
    means = {f"reward/{name}/mean": sum(s.parts.get(name, 0.0) for s in scores) / len(scores) for name in names}
    return means | {
        f"reward/{outcome}": float(sum(score.outcome == outcome for score in scores))
        for outcome in ("failed", "timeout")
    }


def acceptance_metrics(batch: RolloutBatch) -> dict[str, float | None]:
    """Of the rounds of a step; none where nothing was drafted."""
    counters = batch.counters
    if not counters.rounds:
        return {}
    metrics: dict[str, float | None] = {
        "spec/acceptance_length": counters.acceptance_length,
        "spec/acceptance_rate": sum(counters.accepted_at) / counters.drafted,
        "spec/k_mean": counters.k_mean,
        "spec/rounds": float(counters.rounds),
    }
    return metrics | {f"spec/acceptance_pos_{i + 1}": a for i, a in enumerate(counters.acceptance_per_position)}


def evaluation(batch: RolloutBatch) -> dict[str, float]:
    """Mean reward on held-out prompts with its standard error over prompts, and the answers' lengths."""
    per_prompt = batch.rewards.float().mean(dim=1)
    error = float(per_prompt.std() / len(per_prompt) ** 0.5) if len(per_prompt) > 1 else 0.0
    return {
        "eval/reward": float(per_prompt.mean()),
        "eval/stderr": error,
        "eval/length": batch.tokens / len(batch.rollouts),
        "eval/truncated": truncated_share(batch.rollouts),
        "eval/prompts": float(len(per_prompt)),
        "eval/unscored": float(sum(score.outcome != "scored" for score in batch.scores)),
        "time/eval": batch.engine_s + batch.reward_s,
    }


def comparison(step: int, plain: RolloutBatch, speculative: RolloutBatch) -> dict[str, Any]:
    """The same prompts generated both ways in one run. Seconds are the engine's alone."""
    return {
        "step": step,
        "plain_s": plain.engine_s,
        "spec_s": speculative.engine_s,
        "plain_tokens": plain.tokens,
        "spec_tokens": speculative.tokens,
        "plain_tokens_per_s": plain.tokens / plain.engine_s,
        "spec_tokens_per_s": speculative.tokens / speculative.engine_s,
        "speedup": plain.engine_s / speculative.engine_s,
    }


def truncated_share(rollouts: Sequence[Rollout]) -> float:
    """Share of rollouts that ended at a limit, without an end token or stop string."""
    return sum(r.finish_reason in ("length", "context") for r in rollouts) / len(rollouts)


def rollout_samples(step: int, batch: RolloutBatch, advantages: Tensor, policy: Policy) -> Iterator[dict[str, Any]]:
    """The first rollouts of a step (counted from 1) as rollouts.jsonl keeps them. `advantages` [P·n]."""
    decode = policy.tokenizer.decode
    rewards = batch.rewards.view(-1).tolist()
    for i, rollout in enumerate(batch.rollouts[:SAMPLES_KEPT]):
        yield {
            "step": step,
            "prompt_id": f"{step}/{rollout.prompt_index}",
            "prompt": decode(rollout.prompt_ids),
            "text": batch.texts[i],
            "reward": rewards[i] if math.isfinite(rewards[i]) else None,
            "advantage": float(advantages[i]) if bool(advantages[i].isfinite()) else None,
            "tokens": len(rollout.tokens),
            "finish_reason": rollout.finish_reason,
            "reward_parts": dict(batch.scores[i].parts),
            "reward_fault": batch.scores[i].fault,
            "rounds": rollout.rounds,
            "accepted_mask": rollout.drafted,
            "token_texts": [decode([t]) for t in rollout.tokens],
        }


def thinned(timeline: list[tuple[float, int]], points: int = 400) -> list[tuple[float, int]]:
    """At most about `points` points, the last one kept."""
    stride = max(1, len(timeline) // points)
    return [*timeline[::stride], timeline[-1]] if timeline else []
