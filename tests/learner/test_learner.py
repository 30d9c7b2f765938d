"""GRPO against the obvious implementation, and what must not change an update."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from forerun.algorithms import Algorithm
from forerun.algorithms.advantages import group_advantages, grpo_advantages
from forerun.algorithms.losses import TOKEN_MEAN, kl_k3
from forerun.config import TrainConfig
from forerun.engine.local.engine import LocalEngine
from forerun.errors import Interrupted, UserError
from forerun.events import finish
from forerun.learner.learner import Learner
from forerun.learner.objective import mismatch
from forerun.learner.optimizer import MasterOptimizer
from forerun.models import Policy, load_policy
from forerun.models.logprobs import completion_logits, microbatches, token_batch, token_entropy, token_logprobs
from forerun.types import Rollout

PROMPTS = [[5, 6, 7], [9, 3, 1, 2, 4, 4], [20, 21]]


@pytest.fixture
def fresh(tiny: Callable[..., Path]) -> Policy:
    """A policy of its own for every test: these tests train it."""
    return load_policy(str(tiny("llama")), "float32", "cpu")


def sampled(policy: Policy) -> tuple[list[Rollout], torch.Tensor]:
    rollouts = LocalEngine(policy, slots=8).generate(PROMPTS, max_new_tokens=12, n=4, seed=1)
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])
    return rollouts, group_advantages(rewards).view(-1)


def gradients(policy: Policy, config: TrainConfig) -> dict[str, torch.Tensor]:
    rollouts, advantages = sampled(policy)
    learner = Learner(policy, config, 1.0)
    found: dict[str, torch.Tensor] = {}
    names = [n for n, p in policy.model.named_parameters()]

    def capture(rate: float) -> float:
        for name, master in zip(names, learner.optimizer.masters, strict=True):
            found[name] = torch.zeros_like(master) if master.grad is None else master.grad.clone()
        policy.model.zero_grad()
        return 0.0

    learner.optimizer.step = capture  # type: ignore[method-assign]
    finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), 1e-3))
    return found


def naive_loss(policy: Policy, rollouts: list[Rollout], advantages: torch.Tensor) -> torch.Tensor:
    """-A·log-ratio gradient at ratio 1, one sequence at a time, over all tokens of the batch."""
    total, count = torch.zeros(()), 0
    for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.tokens])
        rows = torch.log_softmax(policy.model(ids).logits[0].float(), -1)
        at = torch.arange(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        logprobs = rows[at, torch.tensor(rollout.tokens)]
        total = total - ((logprobs - logprobs.detach()).exp() * advantage).sum()
        count += len(rollout.tokens)
    return total / count


def test_advantages() -> None:
    a = group_advantages(torch.tensor([[1.0, 0, 0, 1], [0.3, 0.3, 0.3, 0.3]]))
    expected = 0.5 / math.sqrt(1 / 3)
    torch.testing.assert_close(a[0], torch.tensor([expected, -expected, -expected, expected]), atol=1e-5, rtol=0)
    assert a[1].tolist() == [0, 0, 0, 0]  # exactly, so that the learner may leave the group out
    assert group_advantages(torch.tensor([[1.0, 0.0]]), normalize_std=False).tolist() == [[0.5, -0.5]]


def test_gradient_equals_the_naive_one(fresh: Policy) -> None:
    rollouts, advantages = sampled(fresh)
    naive_loss(fresh, rollouts, advantages).backward()
    expected = {n: p.grad.clone() for n, p in fresh.model.named_parameters() if p.grad is not None}
    fresh.model.zero_grad()
    found = gradients(fresh, TrainConfig())
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"microbatch_tokens": 20}, {"microbatch_tokens": 1}, {"gradient_checkpointing": True}]
)
def test_how_the_batch_is_cut_does_not_matter(fresh: Policy, changes: dict[str, int]) -> None:
    whole, cut = gradients(fresh, TrainConfig()), gradients(fresh, TrainConfig(**changes))
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-5, rtol=1e-3)


DROPPING = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.3}
SHAPES: dict[str, dict[str, Any]] = {
    "OPT": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "XGLM": {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48, "scale_embedding": True},
}


def _count(kept: list[int], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("family", SHAPES)
def test_recomputed_layers_drop_nothing_out(family: str) -> None:
    """Models whose layers call dropout as a function, and leave whole layers out, in training mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, max_position_embeddings=64, **SHAPES[family], **DROPPING
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    policy = Policy(model, None, family)
    source = random.Random(0)
    rollouts = [Rollout([5, 6, 7], source.choices(range(40), k=n), [-3.0] * n, [0] * n, "eos") for n in (12, 5, 9)]
    plain = finish(Learner(policy, TrainConfig(), 1.0).score(rollouts))
    found = {}
    for recomputes in (False, True):
        learner = Learner(policy, TrainConfig(gradient_checkpointing=recomputes), 1.0)
        for scored in (finish(learner.score(rollouts)), finish(learner.score(rollouts))):
            assert all(torch.equal(a, b) for a, b in zip(scored.logprobs, plain.logprobs, strict=True))
        batch = token_batch([(r.prompt_ids, r.tokens) for r in rollouts], policy.device)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_count, kept), lambda x: x):
            logprobs = token_logprobs(completion_logits(model, batch), batch.targets, 1.0)
        assert torch.equal(logprobs.detach(), torch.cat(plain.logprobs))
        model.zero_grad()
        logprobs.mean().backward()
        found[recomputes] = sum(kept), [p.grad.clone() for p in model.parameters() if p.grad is not None]
        learner.close()
        assert not any("forward" in vars(module) for module in model.modules()) and not model.training
    assert found[True][0] < found[False][0] / 2
    for whole, recomputed in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(recomputed, whole, atol=1e-6, rtol=1e-5)


def test_a_model_without_layers_to_recompute_is_refused(fresh: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forerun.learner.learner.GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(UserError, match="LlamaForCausalLM has none; set it to false"):
        Learner(fresh, TrainConfig(gradient_checkpointing=True), 1.0)


def test_a_vocabulary_masked_by_logits_of_minus_infinity_is_trained_on(fresh: Policy) -> None:
    """As padded vocabularies are by a bias: the same figures as without the rows that can never be sampled."""
    rollouts, advantages = sampled(fresh)
    weight = fresh.model.get_output_embeddings().weight.detach()
    masked = copy.deepcopy(fresh)
    for policy, excluded in ((fresh, 0), (masked, 8)):
        head = torch.nn.Linear(weight.shape[1], len(weight) + excluded)
        with torch.no_grad():
            head.weight.copy_(torch.cat([weight, torch.randn(excluded, weight.shape[1])]))
            head.bias.copy_(torch.tensor([0.0] * len(weight) + [-torch.inf] * excluded))
        policy.model.set_output_embeddings(head)
    outcomes = []
    for policy in (fresh, masked):
        learner = Learner(policy, TrainConfig(kl=0.1), 1.0)
        scored = finish(learner.score(rollouts))
        metrics = finish(learner.update(rollouts, advantages, scored, 1e-2))
        outcomes.append((scored, metrics, finish(learner.score(rollouts))))
    (plain, expected, after), (scored, metrics, after_masked) = outcomes
    assert metrics == pytest.approx(expected, rel=1e-4) and math.isfinite(metrics["policy/entropy"])
    assert scored.entropies == pytest.approx(plain.entropies, rel=1e-5)
    torch.testing.assert_close(torch.cat(after_masked.logprobs), torch.cat(after.logprobs), atol=1e-3, rtol=1e-3)
    assert bool(torch.isneginf(head.bias[-8:]).all()) and bool(head.weight.isfinite().all())


def test_entropy_is_that_of_the_tokens_that_can_be(fresh: Policy) -> None:
    logits = torch.randn(300, 40)
    wide = torch.cat([logits, torch.full((300, 5), -torch.inf)], dim=1)
    torch.testing.assert_close(token_entropy(wide, 0.7), token_entropy(logits, 0.7))
    log_p = torch.log_softmax(logits / 0.7, -1)
    assert torch.equal(token_entropy(logits, 0.7), -(log_p.exp() * log_p).sum(-1))
    sure = torch.full((1, 4), -torch.inf)
    sure[0, 2] = 3.0
    assert token_entropy(sure, 1.0).tolist() == [0.0]


def test_scores_agree_with_the_engine(fresh: Policy) -> None:
    rollouts, _ = sampled(fresh)
    scored = finish(Learner(fresh, TrainConfig(microbatch_tokens=30), 1.0).score(rollouts))
    for rollout, logprobs in zip(rollouts, scored.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, atol=5e-5, rtol=0)
    assert 0 <= mismatch(rollouts, scored)["mismatch/kl"] < 1e-6 and scored.entropy > 0


def test_an_update_raises_the_good_samples(fresh: Policy) -> None:
    rollouts, advantages = sampled(fresh)
    learner = Learner(fresh, TrainConfig(kl=0.01), 1.0)
    before = finish(learner.score(rollouts))
    assert before.reference is not None and torch.equal(before.reference[0], before.logprobs[0])
    metrics = finish(learner.update(rollouts, advantages, before, 1e-3))
    after = finish(learner.score(rollouts))
    gain = sum(
        float(a) * float((x - y).sum()) for a, x, y in zip(advantages, after.logprobs, before.logprobs, strict=True)
    )
    assert gain > 0 and metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert float(torch.cat([kl_k3(x, y) for x, y in zip(after.logprobs, before.logprobs, strict=True)]).mean()) > 0


def test_bfloat16_parameters_learn_through_their_masters() -> None:
    """Updates far below bfloat16's resolution are lost without masters; with them they add up."""
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([parameter], TrainConfig())
    for _ in range(100):
        parameter.sum().backward()
        optimizer.step(1e-4)
    torch.testing.assert_close(optimizer.masters[0].data, torch.full((8,), 0.99), atol=1e-4, rtol=0)
    neighbours = {0.98828125, 0.9921875}  # the bfloat16 numbers around the master
    assert set(parameter.data.float().tolist()) <= neighbours
    with torch.no_grad():  # the control: the same hundred steps straight in bfloat16 do not move at all
        bare = torch.ones(8, dtype=torch.bfloat16)
        for _ in range(100):
            bare -= 1e-4
    assert torch.equal(bare, torch.ones(8, dtype=torch.bfloat16))


def test_nothing_is_updated_from_a_gradient_that_is_not_finite(fresh: Policy) -> None:
    rollouts, advantages = sampled(fresh)
    learner = Learner(fresh, TrainConfig(), 1.0)
    scored = finish(learner.score(rollouts))
    before = {k: v.clone() for k, v in fresh.model.state_dict().items()}
    metrics = finish(learner.update(rollouts, advantages * float("inf"), scored, 1e-3))
    assert metrics["policy/skipped_updates"] == 1 and learner.updates == 0
    with pytest.raises(Interrupted):
        finish(learner.update(rollouts, advantages, scored, 1e-3, stop_requested=lambda: True))
    assert all(torch.equal(v, fresh.model.state_dict()[k]) for k, v in before.items())


def broken_input(name: str) -> dict[str, Any]:
    """Settings and inputs of an update in which this is not finite, and nothing before it."""
    loss = Algorithm(grpo_advantages, lambda batch, config: (batch.logprobs.sqrt(), {}), TOKEN_MEAN, {})
    return {
        "advantages": {"advantage": math.nan},
        "old": {"old": math.nan},
        "behaviour": {"behaviour": math.nan},
        "loss itself": {"algorithm": loss},
    }[name]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("advantages", "not finite are the advantages"),
        ("old", "not finite are the policy's log-probabilities before the update"),
        ("behaviour", "not finite are the log-probabilities that the engine returned"),
        ("loss itself", "all that it reads is finite, so look into the algorithm's loss"),
    ],
)
def test_a_loss_that_is_not_finite_says_what_made_it_so(fresh: Policy, name: str, sentence: str) -> None:
    broken = broken_input(name)
    rollouts, advantages = sampled(fresh)
    learner = Learner(fresh, TrainConfig(), 1.0)
    learner.objective.algorithm = broken.get("algorithm", learner.objective.algorithm)
    scored = finish(learner.score(rollouts))
    scored.logprobs[0][0] += broken.get("old", 0.0)
    rollouts[0].logprobs[0] += broken.get("behaviour", 0.0)
    finish(learner.update(rollouts, advantages + broken.get("advantage", 0.0), scored, 1e-3))
    assert f"loss of train.algorithm=grpo is not finite: {sentence}" in learner.objective.skip_reason


def test_a_finite_loss_with_another_gradient_blames_the_gradient(fresh: Policy) -> None:
    """sqrt(0) is finite, its slope is not."""
    rollouts, advantages = sampled(fresh)
    learner = Learner(fresh, TrainConfig(), 1.0)
    steep = Algorithm(grpo_advantages, lambda batch, _: ((batch.logprobs * 0).abs().sqrt(), {}), TOKEN_MEAN, {})
    learner.objective.algorithm = steep
    for count in (1, 2):
        finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), 1e-3))
        assert "The loss is finite, but the policy's gradient is not" in learner.objective.skip_reason
        assert learner.objective.skipped_in_row == count
    learner.objective.algorithm = Learner(fresh, TrainConfig(), 1.0).objective.algorithm
    after = finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), 1e-3))
    assert learner.objective.skipped_in_row == 0 and after["policy/skipped_updates"] == 0 and learner.updates == 1


def test_microbatches_hold_every_row_once_within_the_bound() -> None:
    lengths = [5, 17, 3, 9, 30, 2, 2, 8]
    groups = microbatches(lengths, 20)
    assert sorted(i for g in groups for i in g) == list(range(8))
    assert all(len(g) * max(lengths[i] for i in g) <= 20 or len(g) == 1 for g in groups)
