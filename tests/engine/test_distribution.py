"""Are rollouts samples of the policy? The whole engine, with speculation, against the exact law of three tokens.

20,000 samples from a tiny float32 model, V = 12: chi-square over all first-three-token texts, rare ones pooled.
Power: a verifier that resamples from p instead of the residual moves this law by a total variation of several percent,
against a noise floor of about one percent; the same test must reject it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chi_square import p_value_of_texts
from forerun.acceptance import broken
from forerun.acceptance.truncate import EVERYTHING, Truncation
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.models import Policy, load_policy
from proofs.references import reference_truncate
from tiny_models import random_drafter

VOCABULARY, SAMPLES, PROMPT = 12, 20_000, [3, 7, 5]


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama", vocab_size=VOCABULARY, initializer_range=0.25)), "float32", "cpu")


def exact_law(policy: Policy, temperature: float, cuts: Truncation = EVERYTHING) -> dict[tuple[int, ...], float]:
    """Probability of every text of up to three tokens; the end token (0) ends it."""
    law: dict[tuple[int, ...], float] = {}
    frontier = {(): 1.0}
    for step in range(3):
        texts = list(frontier)
        with torch.no_grad():
            rows = policy.model(torch.tensor([PROMPT + list(t) for t in texts])).logits[:, -1]
        following: dict[tuple[int, ...], float] = {}
        for text, row in zip(texts, rows.tolist(), strict=True):
            for token, p in enumerate(reference_truncate(row, temperature, cuts)):
                ended = token == 0 or step == 2
                (law if ended else following)[(*text, token)] = frontier[text] * p
        frontier = following
    return law


def sample(policy: Policy, engine: LocalEngine, temperature: float, seed: int) -> Counter[tuple[int, ...]]:
    rollouts = engine.generate([PROMPT], max_new_tokens=3, temperature=temperature, n=SAMPLES, seed=seed)
    return Counter(tuple(r.tokens) for r in rollouts)


@pytest.mark.parametrize("rule", ["block", "token"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_samples_the_policy(small: Policy, rule: str, temperature: float) -> None:
    """A correct engine fails this less than once in a million seeds."""
    drafter = random_drafter(small, vocabulary=[0, 1, 2, 3, 5, 7, 8, 11])
    engine = LocalEngine(small, drafter, k=2, rule=rule, slots=1000)
    counts = sample(small, engine, temperature, seed=1)
    assert engine.metrics()["acceptance_per_position"][1] > 0.05, "nothing was speculated: the test would be idle"
    assert p_value_of_texts(counts, exact_law(small, temperature)) > 1e-6


@pytest.mark.parametrize("rule", ["block", "token"])
@pytest.mark.parametrize(
    "cuts", [Truncation(top_k=4), Truncation(top_p=0.7), Truncation(min_p=0.3), Truncation(6, 0.9, 0.1)]
)
def test_truncated_samples_follow_the_processed_law(small: Policy, rule: str, cuts: Truncation) -> None:
    """Speculative samples at T = 0.7. Negative control: the law without cuts."""
    drafter = random_drafter(small, vocabulary=[0, 1, 2, 3, 5, 7, 8, 11])
    engine = LocalEngine(small, drafter, k=2, rule=rule, slots=1000)
    rollouts = list(engine.stream([PROMPT], Sampling(3, 0.7, 4, truncation=cuts), SAMPLES))
    counts, law = Counter(tuple(r.tokens) for r in rollouts), exact_law(small, 0.7, cuts)
    assert engine.metrics()["acceptance_per_position"][1] > 0.02, "nothing was speculated: the test would be idle"
    possible = {text: p for text, p in law.items() if p > 0}
    assert p_value_of_texts(counts, possible) > 1e-6
    assert p_value_of_texts(counts, exact_law(small, 0.7)) < 1e-6
    for r in rollouts[:50]:
        shares = [math.exp(x) for x in r.logprobs]
        assert math.isclose(math.prod(shares), law[tuple(r.tokens)], rel_tol=1e-3)


def test_plain_engine_samples_the_policy(small: Policy) -> None:
    counts = sample(small, LocalEngine(small, slots=1000), 1.0, seed=2)
    assert p_value_of_texts(counts, exact_law(small, 1.0)) > 1e-6


@pytest.mark.parametrize("fault", ["no_residual", "block_no_residual", "block_threshold_is_prefix", "misaligned_row"])
def test_a_broken_rule_is_caught(small: Policy, fault: str) -> None:
    drafter = random_drafter(small, vocabulary=[0, 1, 2, 3, 5, 7, 8, 11])
    rule = broken.BROKEN[fault]
    engine = LocalEngine(small, drafter, k=2, slots=1000, verifier=lambda _, inputs: rule(inputs))
    counts = sample(small, engine, 1.0, seed=1)
    law = exact_law(small, 1.0)
    distance = 0.5 * sum(abs(counts[t] / SAMPLES - p) for t, p in law.items())
    assert p_value_of_texts(counts, law) < 1e-6, f"total variation {distance:.3f} went unnoticed"


def test_law_has_mass_one(small: Policy) -> None:
    assert math.isclose(sum(exact_law(small, 1.0).values()), 1.0, abs_tol=1e-9)
