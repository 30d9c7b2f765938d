"""Algorithms against numbers worked out by hand and against a loop over sequences; and one that a user brings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forerun.algorithms import ALGORITHMS, Algorithm, PolicyBatch
from forerun.algorithms.advantages import group_advantages
from forerun.algorithms.losses import batch_loss, clipped_loss
from forerun.config import TrainConfig, load_recipe
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.events import finish
from forerun.learner.learner import Learner
from forerun.learner.objective import Scored
from forerun.models import Policy, load_policy
from forerun.tracking.metrics import definition_of
from forerun.tracking.run_folder import RunFolder
from forerun.types import Rollout

PROMPTS = [[5, 6, 7], [9, 3, 1, 2, 4, 4], [20, 21]]
REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0.5, 1, 0]])
LIMIT = 12  # max_new_tokens
NAMES = ["grpo", "dr_grpo", "gspo"]


def by_hand() -> PolicyBatch:
    """Two sequences, of two tokens and of one."""
    return PolicyBatch(
        logprobs=torch.tensor([math.log(1.2), math.log(1.5), math.log(0.5)]),
        old=torch.zeros(3),
        behaviour=torch.zeros(3),
        reference=None,
        advantages=torch.tensor([1.0, 1.0, -1.0]),
        importance_weights=torch.tensor([1.0, 0.5, 1.0]),
        sequence=torch.tensor([0, 0, 1]),
    )


@pytest.mark.parametrize(
    ("name", "losses", "ratio", "size", "loss"),
    [
        # clipped to 0.8 and 1.3; the second token weighs one half
        ("grpo", [-1.2, -1.3 / 2, 0.8], 1.2 + 1.5 + 0.5, 3, (-1.2 - 0.65 + 0.8) / 3),
        ("dr_grpo", [-1.2, -1.3 / 2, 0.8], 1.2 + 1.5 + 0.5, 2 * LIMIT, (-1.2 - 0.65 + 0.8) / 24),
        # the first ratio is sqrt(1.2 * 1.5) = 1.3416, clipped to 1.3
        ("gspo", [-1.3, -1.3 / 2, 0.8], 2 * math.sqrt(1.8) + 0.5, 2, ((-1.3 - 0.65) / 2 + 0.8) / 2),
    ],
)
def test_losses_by_hand(name: str, losses: list[float], ratio: float, size: int, loss: float) -> None:
    algorithm: Algorithm = ALGORITHMS.load(name)
    config, batch = TrainConfig(clip_low=0.2, clip_high=0.3), by_hand()
    found, sums = algorithm.loss(batch, config)
    torch.testing.assert_close(found, torch.tensor(losses))
    assert float(sums["policy/ratio_mean"]) == pytest.approx(ratio)
    assert (int(sums["policy/clip_low"]), int(sums["policy/clip_high"])) == (1, 2 if name == "gspo" else 1)
    assert sums.keys() == algorithm.metrics.keys()
    assert algorithm.aggregation.size([2, 1], LIMIT) == size
    assert float(batch_loss(algorithm, batch, config, size)[0]) == pytest.approx(loss)
    penalised, sums = batch_loss(algorithm, replace(batch, reference=torch.zeros(3)), TrainConfig(kl=0.1), size)
    kl = [1 / r - 1 + math.log(r) for r in (1.2, 1.5, 0.5)]
    assert float(sums["policy/kl"]) == pytest.approx(sum(kl))
    share = [1 / 2, 1 / 2, 1] if name == "gspo" else [1, 1, 1]
    plain, _ = batch_loss(algorithm, batch, TrainConfig(), size)
    expected = 0.1 * sum(k * s for k, s in zip(kl, share, strict=True)) / size
    assert float(penalised - plain) == pytest.approx(expected, rel=1e-4)


def test_a_ratio_is_clipped_only_where_that_lowers_the_gain() -> None:
    """Every case of PPO's minimum: ratio above and below the bounds, advantage of either sign."""
    ratios, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    batch = PolicyBatch(ratios.log(), *torch.zeros(2, 4), None, advantages, torch.ones(4), torch.arange(4))
    config = TrainConfig(clip_low=0.2, clip_high=0.3)
    losses, sums = clipped_loss(batch, config)
    torch.testing.assert_close(losses, torch.tensor([-1.3, 1.5, -0.5, 0.8]))
    assert (int(sums["policy/clip_high"]), int(sums["policy/clip_low"])) == (1, 1)
    corrected, _ = clipped_loss(replace(batch, importance_weights=torch.tensor([0.5, 0.0, 2.0, 1.0])), config)
    torch.testing.assert_close(corrected, torch.tensor([-0.65, 0.0, -1.0, 0.8]))


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_without_tokens_adds_nothing(name: str) -> None:
    """A rank that has fewer rows than the others runs some."""
    nothing = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0)
    batch = PolicyBatch(nothing, none, none, none, none, none, torch.zeros(0, dtype=torch.int64))
    loss, sums = batch_loss(ALGORITHMS.load(name), batch, TrainConfig(kl=0.1), 5)
    loss.backward()
    assert float(loss.detach()) == 0 and all(float(value) == 0 for value in sums.values())


def test_advantages_of_dr_grpo_are_not_scaled() -> None:
    algorithm: Algorithm = ALGORITHMS.load("dr_grpo")
    found = algorithm.advantages(torch.tensor([[1.0, 0, 0, 1], [0.3, 0.3, 0.3, 0.3]]), TrainConfig())
    assert found.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]


# ---- the learner, against a loop over sequences ----


def sampled(policy: Policy) -> list[Rollout]:
    return LocalEngine(policy, slots=8).generate(PROMPTS, max_new_tokens=LIMIT, n=4, seed=1)


def moved(scored: Scored) -> Scored:
    """As if the policy had been another before the update: ratios on both sides of the clipping bounds."""
    source = torch.Generator().manual_seed(0)
    shift = 0.4 * (-1.0) ** torch.arange(1, len(scored.logprobs) + 1)
    old = [x + 0.3 * torch.randn(len(x), generator=source) + s for x, s in zip(scored.logprobs, shift, strict=True)]
    return replace(scored, logprobs=old)


def slow_loss(name: str, policy: Policy, config: TrainConfig, rollouts: list[Rollout], scored: Scored) -> Tensor:
    """One sequence at a time, as the papers write it, without a correction."""
    advantages = group_advantages(REWARDS, name != "dr_grpo").view(-1).tolist()
    total, tokens = torch.zeros(()), sum(len(r.tokens) for r in rollouts)
    for rollout, advantage, old in zip(rollouts, advantages, scored.logprobs, strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.tokens])
        rows = torch.log_softmax(policy.model(ids).logits[0].float(), -1)[len(rollout.prompt_ids) - 1 : -1]
        log_ratio = rows[range(len(rollout.tokens)), rollout.tokens] - old
        ratio = log_ratio.mean().exp() if name == "gspo" else log_ratio.exp()
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        surrogate = torch.minimum(ratio * advantage, bounded * advantage).sum()
        size = {"grpo": tokens, "dr_grpo": len(rollouts) * LIMIT, "gspo": len(rollouts)}[name]
        total = total - surrogate / size
    return total


def gradients(tiny: Callable[..., Path], config: TrainConfig) -> tuple[list[Tensor], dict[str, float], Policy, Scored]:
    """Of one update by the learner; its metrics; a policy that is still as it was, and what was scored."""
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    rollouts = sampled(policy)
    learner = Learner(policy, config, 1.0, max_new_tokens=LIMIT)
    scored = moved(finish(learner.score(rollouts)))
    seen: list[Tensor] = []

    def capture(rate: float) -> float:
        seen.extend(torch.zeros_like(m) if m.grad is None else m.grad.clone() for m in learner.optimizer.masters)
        return 0.0

    learner.optimizer.step = capture  # type: ignore[method-assign]
    advantages = learner.objective.algorithm.advantages(REWARDS, config).view(-1)
    metrics = finish(learner.update(rollouts, advantages, scored, 1e-3))
    return seen, metrics, load_policy(str(tiny("llama")), "float32", "cpu"), scored


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_a_loop_over_sequences(tiny: Callable[..., Path], name: str) -> None:
    """And so is the loss, padded or packed, in one micro-batch or in many. The control: other algorithms."""
    config = TrainConfig(algorithm=name, correction="none")
    _, _, policy, scored = gradients(tiny, config)
    rollouts = sampled(policy)
    loss = slow_loss(name, policy, config, rollouts, scored)
    loss.backward()
    expected = [p.grad for p in policy.model.parameters()]
    largest = max(float(g.abs().max()) for g in expected if g is not None)
    for changes in ({}, {"microbatch_tokens": 40}, {"packing": True}, {"packing": True, "microbatch_tokens": 40}):
        found, metrics, _, _ = gradients(tiny, config.model_copy(update=changes))
        assert metrics["policy/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert metrics["policy/clip_low"] > 0 and metrics["policy/clip_high"] > 0
        assert distance(found, expected) < 1e-4 * largest
    for other in set(NAMES) - {name}:
        found, _, _, _ = gradients(tiny, config.model_copy(update={"algorithm": other}))
        assert distance(found, expected) > 0.1 * largest


def distance(found: list[Tensor], expected: list[Tensor | None]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs if y is not None)


def test_an_update_without_a_gradient_has_the_statistics_of_a_policy_at_rest(tiny: Callable[..., Path]) -> None:
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    rollouts = sampled(policy)
    for name in NAMES:
        learner = Learner(policy, TrainConfig(algorithm=name), 1.0, max_new_tokens=LIMIT)
        metrics = finish(learner.update(rollouts, torch.zeros(12), finish(learner.score(rollouts)), 1e-3))
        assert metrics["policy/ratio_mean"] == 1
        for other in ("loss", "clip_low", "clip_high", "kl", "grad_norm"):
            assert metrics[f"policy/{other}"] == 0


# ---- an algorithm of one's own ----

OWN = """
from forerun.algorithms import Algorithm
from forerun.algorithms.advantages import grpo_advantages
from forerun.algorithms.losses import TOKEN_MEAN

def reinforce(batch, config):
    return -batch.logprobs * batch.advantages, {"policy/certain": (batch.logprobs.detach() > -0.5).sum()}

METRICS = {"policy/certain": "Share of likely tokens. Unit: share."}
REINFORCE = Algorithm(grpo_advantages, reinforce, TOKEN_MEAN, METRICS)
"""


def test_an_algorithm_from_outside_trains_and_its_metrics_are_defined(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = TrainConfig(algorithm="outside:REINFORCE")
    assert definition_of("policy/certain") is None
    _, metrics, _, _ = gradients(tiny, config)
    assert definition_of("policy/certain") == "Share of likely tokens. Unit: share."
    assert 0 < metrics["policy/certain"] < 1 and "policy/ratio_mean" not in metrics
    run = RunFolder.create(tmp_path, "a")
    run.log(1, dict(metrics))
    with pytest.raises(UserError, match='"policy/certainty" has no definition; did you mean "policy/certain"'):
        run.log(2, {"policy/certainty": 1.0})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"train.algorithm": "gpso"}, "'train.algorithm': No algorithm is called 'gpso'; did you mean 'gspo'?"),
        ({"train.algorithm": "ppo"}, "did you mean 'grpo'|there are grpo, dr_grpo, gspo"),
    ],
)
def test_an_unknown_algorithm_is_refused_with_the_nearest_name(override: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("quickstart", override)
