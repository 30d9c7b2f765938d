"""GRPO's update is bit for bit that of the loss written out here, however the batch is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forerun.algorithms.advantages import group_advantages
from forerun.algorithms.off_policy import correct
from forerun.config import TrainConfig
from forerun.engine.local.engine import LocalEngine
from forerun.events import finish
from forerun.learner.learner import Learner
from forerun.learner.optimizer import MasterOptimizer
from forerun.learner.packing import attend_by_sequence, packed_microbatches
from forerun.models import Policy, load_policy
from forerun.models.logprobs import completion_logits, microbatches, packed_batch
from forerun.types import Rollout

PROMPTS = [[5, 6, 7], [9, 3, 1, 2, 4, 4], [20, 21]]
REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0.5, 1, 0]])
SGD = {"optimizer": "sgd", "max_grad_norm": 0.5}


def written_out(
    policy: Policy, config: TrainConfig, rollouts: list[Rollout], advantages: Tensor, rate: float
) -> dict[str, float]:
    """One update of GRPO, without the learner: metrics; the policy is changed."""
    start = copy.deepcopy(policy.model)
    if config.packing:
        attend_by_sequence(policy.model)
        attend_by_sequence(start)
    optimizer = MasterOptimizer(policy.model.parameters(), config)

    def batches(chosen: list[int]) -> list[tuple[list[int], Any]]:
        pairs = [(rollouts[i].prompt_ids, rollouts[i].tokens) for i in chosen]
        lengths = [len(p) + len(c) for p, c in pairs]
        groups = [[[j] for j in g] for g in microbatches(lengths, config.microbatch_tokens)]
        groups = packed_microbatches(lengths, config.microbatch_tokens) if config.packing else groups
        cut = [packed_batch([[pairs[j] for j in row] for row in group], policy.device) for group in groups]
        rows = [[chosen[j] for row in group for j in row] for group in groups]
        return [(r, b if config.packing else replace(b, position_ids=None)) for r, b in zip(rows, cut, strict=True)]

    def logprobs(model: Any, batch: Any) -> Tensor:
        return torch.log_softmax(completion_logits(model, batch).float(), -1)[range(len(batch.targets)), batch.targets]

    old: dict[int, Tensor] = {}
    reference: dict[int, Tensor] = {}
    with torch.no_grad():
        for rows, batch in batches(list(range(len(rollouts)))):
            lengths = [len(rollouts[i].tokens) for i in rows]
            old |= dict(zip(rows, logprobs(policy.model, batch).split(lengths), strict=True))
            reference |= dict(zip(rows, logprobs(start, batch).split(lengths), strict=True))
    lengths = [len(r.tokens) for r in rollouts]
    behaviour = torch.tensor([x for r in rollouts for x in r.logprobs])
    weights = correct(config, torch.cat([old[i] for i in range(len(rollouts))]), behaviour, lengths).importance_weights
    weight = weights.split(lengths)
    trained = [i for i in range(len(rollouts)) if config.kl > 0 or (advantages[i] != 0 and weight[i].any())]
    chunks = [trained[u :: config.updates_per_step] for u in range(config.updates_per_step)]
    size = sum(lengths) / len(chunks)
    sums = dict.fromkeys(("loss", "ratio", "low", "high", "kl", "tokens"), 0.0)
    norms = []
    for chunk in chunks:
        for rows, batch in batches(chunk):
            new = logprobs(policy.model, batch)
            before = torch.cat([old[i] for i in rows])
            advantage = torch.cat([advantages[i].expand(lengths[i]) for i in rows])
            ratio = (new - before).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            surrogate = -torch.minimum(ratio * advantage, clipped * advantage) * torch.cat([weight[i] for i in rows])
            loss = surrogate.sum() / size
            if config.kl > 0:
                gap = torch.cat([reference[i] for i in rows]) - new
                kl = gap.exp() - 1 - gap
                loss = loss + config.kl * kl.sum() / size
                sums["kl"] += float(kl.detach().sum())
            loss.backward()
            sums["loss"] += float(loss.detach())
            sums["ratio"] += float(ratio.detach().sum())
            sums["low"] += float(((ratio < 1 - config.clip_low) & (advantage < 0)).sum())
            sums["high"] += float(((ratio > 1 + config.clip_high) & (advantage > 0)).sum())
            sums["tokens"] += len(new)
        norms.append(optimizer.step(rate))
    return {
        "policy/loss": sums["loss"] / config.updates_per_step,
        "policy/grad_norm": sum(norms) / len(norms),
        "policy/lr": rate,
        "policy/ratio_mean": sums["ratio"] / sums["tokens"],
        "policy/clip_low": sums["low"] / sums["tokens"],
        "policy/clip_high": sums["high"] / sums["tokens"],
        "policy/kl": sums["kl"] / sums["tokens"],
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"updates_per_step": 3, "microbatch_tokens": 30, "clip_low": 0.02, "clip_high": 0.05},
        {"updates_per_step": 3, "microbatch_tokens": 30, "clip_low": 0.02, "packing": True},
        {"updates_per_step": 2, "kl": 0.3, "clip_high": 0.05, "microbatch_tokens": 1},
        {"updates_per_step": 2, "kl": 0.3, "correction": "icepop", "importance_band": [0.9, 1.3], "packing": True},
    ],
)
def test_the_update_is_bit_for_bit_the_one_written_out(tiny: Callable[..., Path], changes: dict[str, Any]) -> None:
    """The engine's log-probabilities are moved, so that the correction has something to correct."""
    config = TrainConfig(**SGD | changes)
    mine, theirs = (load_policy(str(tiny("llama")), "float32", "cpu") for _ in range(2))
    rollouts = LocalEngine(mine, slots=8).generate(PROMPTS, max_new_tokens=12, n=4, seed=1)
    source = torch.Generator().manual_seed(0)
    rollouts = [
        replace(r, logprobs=(torch.tensor(r.logprobs) + 0.3 * torch.randn(len(r.tokens), generator=source)).tolist())
        for r in rollouts
    ]
    advantages = group_advantages(REWARDS).view(-1)
    expected = written_out(theirs, config, rollouts, advantages, 0.1)
    learner = Learner(mine, config, 1.0)
    found = finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), 0.1))
    assert {name: found[name] for name in expected} == expected
    for name, weight in theirs.model.state_dict().items():
        assert torch.equal(mine.model.state_dict()[name], weight), name
    if config.updates_per_step > 1:
        assert expected["policy/ratio_mean"] != 1 and expected["policy/clip_low"] + expected["policy/clip_high"] > 0
    assert (expected["policy/kl"] > 0) == (config.kl > 0) and expected["policy/grad_norm"] > 0.5
