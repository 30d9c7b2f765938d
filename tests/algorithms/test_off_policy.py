"""Off-policy correction: against plain Python, on policy, and in expectation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forerun.algorithms import PolicyBatch
from forerun.algorithms.advantages import group_advantages
from forerun.algorithms.losses import clipped_loss
from forerun.algorithms.off_policy import correct
from forerun.config import TrainConfig, load_recipe
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.events import finish
from forerun.learner.learner import Learner
from forerun.models import load_policy
from forerun.tracking.metrics import definition_of
from forerun.types import Rollout

KINDS = ["token_tis", "sequence_mask", "icepop", "none"]
LENGTHS = [7, 1, 40, 12, 3]


def off_policy() -> tuple[list[list[float]], list[list[float]]]:
    """Log-probabilities by learner and engine of a few sequences, the third far off as a whole."""
    source = torch.Generator().manual_seed(0)
    old = [-2 * torch.rand(n, generator=source, dtype=torch.float64) for n in LENGTHS]
    gaps = [0.5 * torch.randn(n, generator=source, dtype=torch.float64) for n in LENGTHS]
    gaps[2] += 0.4
    return [x.tolist() for x in old], [(x - g).tolist() for x, g in zip(old, gaps, strict=True)]


def obvious(kind: str, cap: float, low: float, high: float) -> tuple[list[float], list[bool], list[bool]]:
    """Weights, truncated and masked, token by token as the definitions say it."""
    weights, truncated, masked = [], [], []
    for old, behaviour in zip(*off_policy(), strict=True):
        ratios = [math.exp(o) / math.exp(b) for o, b in zip(old, behaviour, strict=True)]
        whole = math.prod(ratios) ** (1 / len(ratios))
        for ratio in ratios:
            judged = whole if kind == "sequence_mask" else ratio
            out = kind in ("icepop", "sequence_mask") and not low <= judged <= high
            cut = kind in ("token_tis", "sequence_mask") and ratio > cap and not out
            weights.append(0.0 if out else 1.0 if kind == "none" else cap if cut else ratio)
            truncated.append(cut)
            masked.append(out)
    return weights, truncated, masked


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_definitions(kind: str) -> None:
    band = (0.8, 1.25) if kind in ("icepop", "sequence_mask") else None
    config = TrainConfig(correction=kind, importance_cap=1.5, importance_band=band)
    old, behaviour = (torch.tensor([x for part in parts for x in part]) for parts in off_policy())
    found = correct(config, old, behaviour, LENGTHS)
    weights, truncated, masked = obvious(kind, 1.5, *config.band)
    torch.testing.assert_close(found.importance_weights, torch.tensor(weights), atol=1e-5, rtol=1e-5)
    assert found.truncated.tolist() == truncated and found.masked.tolist() == masked
    assert any(truncated) == (kind in ("token_tis", "sequence_mask"))
    assert any(masked) == (kind in ("icepop", "sequence_mask")) and not all(masked)
    metrics, size = found.metrics(LENGTHS), len(weights)
    assert metrics["mismatch/is_weight_mean"] == pytest.approx(sum(weights) / size, abs=1e-5)
    assert metrics["mismatch/is_weight_capped"] == pytest.approx(sum(truncated) / size)
    assert metrics["mismatch/masked_tokens"] == pytest.approx(sum(masked) / size)
    effective = sum(weights) ** 2 / sum(w * w for w in weights) / size
    assert metrics["mismatch/effective_samples"] == pytest.approx(effective, abs=1e-5)


def test_whole_sequences_are_counted() -> None:
    config = TrainConfig(correction="sequence_mask", importance_band=(0.9, 1.1))
    shift = torch.tensor([0.5, -0.5, 0.2, 0.2, 0.2])  # the first two cancel each other out, the others do not
    found = correct(config, shift, torch.zeros(5), [2, 3])
    assert found.masked.tolist() == [False, False, True, True, True]
    assert found.metrics([2, 3])["mismatch/masked_sequences"] == 0.5
    nothing = correct(config, torch.full((5,), 0.5), torch.zeros(5), [2, 3]).metrics([2, 3])
    assert nothing["mismatch/masked_sequences"] == 1.0 and nothing["mismatch/effective_samples"] == 0.0
    tokens = correct(TrainConfig(correction="icepop", importance_band=(0.9, 1.3)), shift, torch.zeros(5), [2, 3])
    assert tokens.masked.tolist() == [True, True, False, False, False]


def batch(tiny: Callable[..., Path], config: TrainConfig, shift: float) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Gradients and metrics of an update whose tokens the engine found `shift` nats likelier than the learner."""
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    rollouts = LocalEngine(policy, slots=8).generate([[5, 6, 7], [9, 3, 1, 2]], max_new_tokens=12, n=4, seed=1)
    learner, seen = Learner(policy, config, 1.0), []
    scored = finish(learner.score(rollouts))
    moved = [moved_by(r, x, shift) for r, x in zip(rollouts, scored.logprobs, strict=True)]

    def capture(rate: float) -> float:
        seen.extend(m.grad.clone() for m in learner.optimizer.masters if m.grad is not None)
        return 0.0

    learner.optimizer.step = capture  # type: ignore[method-assign]
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])).view(-1)
    return seen, finish(learner.update(moved, advantages, scored, 1e-3))


def test_what_the_learner_logs_is_defined(tiny: Callable[..., Path]) -> None:
    _, metrics = batch(tiny, TrainConfig(), 1.0)
    assert "mismatch/is_weight_capped" in metrics and all(definition_of(name) for name in metrics)


def moved_by(rollout: Rollout, logprobs: torch.Tensor, shift: float) -> Rollout:
    return dataclasses.replace(rollout, logprobs=(logprobs + shift).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_nothing_is_corrected(tiny: Callable[..., Path], kind: str) -> None:
    plain, metrics = batch(tiny, TrainConfig(correction="none"), 0.0)
    mine, metrics = batch(tiny, TrainConfig(correction=kind), 0.0)
    assert len(plain) > 10 and all(torch.equal(x, y) for x, y in zip(plain, mine, strict=True))
    assert metrics["mismatch/is_weight_mean"] == 1.0 and metrics["mismatch/is_weight_capped"] == 0.0


def test_the_weights_reach_the_gradient(tiny: Callable[..., Path]) -> None:
    plain, _ = batch(tiny, TrainConfig(correction="none"), 0.5)
    halved, metrics = batch(tiny, TrainConfig(), math.log(2))  # every ratio is one half
    assert max(float(g.abs().max()) for g in plain) > 1e-3
    for x, y in zip(plain, halved, strict=True):
        torch.testing.assert_close(y, 0.5 * x, atol=1e-6, rtol=1e-4)
    assert metrics["mismatch/is_weight_mean"] == pytest.approx(0.5, abs=1e-5)
    masked, metrics = batch(tiny, TrainConfig(correction="sequence_mask"), math.log(2))
    assert metrics["mismatch/is_weight_mean"] == 0.0
    assert not masked, "there was nothing to learn from, and yet an update"


def gradient_of_samples(correction: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimated and expected gradient of E_π[A] by the logits, from tokens of an older policy; standard error. [V] x 3

    A policy over V = 5 tokens, completions of one token, an advantage per token.
    """
    source = torch.Generator().manual_seed(3)
    logits = torch.tensor([0.4, -0.3, 0.0, 0.8, -0.6], dtype=torch.float64)
    older = logits + torch.tensor([0.5, 0.3, -0.4, -0.5, 0.2], dtype=torch.float64)
    values = torch.tensor([1.0, -0.5, 0.3, -1.2, 0.7], dtype=torch.float64)
    log_p, log_b = torch.log_softmax(logits, 0), torch.log_softmax(older, 0)
    tokens = torch.multinomial(log_b.exp(), size, replacement=True, generator=source)
    config = TrainConfig(correction=correction, importance_cap=1e6)
    weights = correct(config, log_p[tokens], log_b[tokens], [1] * size).importance_weights
    at = log_p[tokens].clone().requires_grad_()
    batch = PolicyBatch(at, log_p[tokens], log_b[tokens], None, values[tokens], weights, torch.arange(size))
    clipped_loss(batch, config)[0].sum().backward()
    assert at.grad is not None
    each = -at.grad[:, None] * (torch.nn.functional.one_hot(tokens, 5) - log_p.exp())  # chain rule through log softmax
    expected = log_p.exp() * (values - (log_p.exp() * values).sum())
    return each.mean(0), expected, each.std(0) / math.sqrt(size)


def test_samples_of_an_older_policy_give_the_gradient_on_policy() -> None:
    """Five coordinates within 4.5 standard errors: a true estimator fails with probability below 5e-5.

    The control, no correction, is off by 0.02 to 0.08 per coordinate, 24 to 128 standard errors: it would pass with
    probability below 1e-50.
    """
    found, expected, error = gradient_of_samples("token_tis", 100_000)
    assert bool(((found - expected).abs() < 4.5 * error).all())
    wrong, expected, error = gradient_of_samples("none", 100_000)
    assert float(((wrong - expected).abs() / error).max()) > 20


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"train.correction": "icepop", "train.importance_band": [1.1, 2]}, "leaves out the ratio 1"),
        ({"train.importance_band": [0.5, 2]}, "not for token_tis"),
        ({"train.correction": "tis"}, "correction"),
    ],
)
def test_what_the_recipe_may_not_say(override: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_recipe("quickstart", override)
