"""Every drafter x rule x temperature x k in the whole engine: rollouts are the policy's own, in text and in numbers.

Ragged prompts, several samples of each, fewer slots than samples. At temperature 0 the text is the plain text. Above
it, u_t = (mass of likelier tokens) + v p_t is uniform along every text, whatever its context, if and only if tokens are
drawn from the policy's rows: a chi-square of u over ten cells, all tokens of a cell of the matrix together. About 1,500
tokens find a law that is 8 % of total variation away nine times in ten; a broken rule must be found by the same test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forerun.acceptance.chain import verify
from forerun.acceptance.tree import TreeResult, verify_tree
from forerun.config import GraftConfig, NgramConfig, TrieConfig
from forerun.drafters.base import Drafter
from forerun.drafters.draft_model import ModelDrafter
from forerun.drafters.graft import GraftDrafter
from forerun.drafters.mtp import MtpDrafter, MtpHead
from forerun.drafters.ngram import NgramDrafter
from forerun.drafters.trie import TrieDrafter
from forerun.engine.local.engine import LocalEngine, Verify, VerifyTree
from forerun.lossless.statistics import chi_square_tail, pooled_chi_square
from forerun.models import Policy, load_policy
from forerun.types import Rollout, VerifyInput, VerifyResult
from tiny_models import random_drafter, random_head

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [20, 21, 20, 22, 21, 20], [30] * 14]
SAMPLES, TOKENS, CELLS, LEVEL = 16, 20, 10, 1e-6
TREES = GraftConfig(
    nodes=7, depth=2, width=2, checkpoints=(1,), thresholds=(0.3,), keep=(3,), template=(3, 2), successors=3
)
DRAFTERS = ("eagle3", "ngram", "trie", "model", "mtp", "graft")
CASES = [(name, rule) for name in DRAFTERS for rule in (("walk",) if name == "graft" else ("block", "token"))]


@pytest.fixture(scope="module")
def unsure(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama", initializer_range=0.2)), "float32", "cpu")


@pytest.fixture(scope="module")
def make(unsure: Policy, tiny: Callable[..., Path]) -> Callable[[str], Drafter]:
    smaller = load_policy(str(tiny("llama", num_hidden_layers=1, initializer_range=0.2)), "float32", "cpu")
    makers: dict[str, Callable[[], Drafter]] = {
        "eagle3": lambda: random_drafter(unsure),
        "ngram": lambda: NgramDrafter(NgramConfig(prompt_lookup_max=3, prompt_lookup_min=1)),
        "trie": lambda: TrieDrafter(TrieConfig(match_min=1, match_max=4, floor=0.0)),
        "model": lambda: ModelDrafter(smaller, unsure),
        "mtp": lambda: MtpDrafter(MtpHead(unsure, 2), unsure),
        "graft": lambda: GraftDrafter(random_head(unsure), unsure, TREES),
    }
    return lambda name: makers[name]()


def rollouts_of(
    policy: Policy,
    drafter: Drafter | None,
    k: int,
    temperature: float,
    rule: str,
    verifier: Verify = verify,
    tree_verifier: VerifyTree = verify_tree,
) -> list[Rollout]:
    engine = LocalEngine(policy, drafter, k=k, rule=rule, slots=32, verifier=verifier, tree_verifier=tree_verifier)
    rollouts = engine.generate(
        PROMPTS, max_new_tokens=TOKENS, temperature=temperature, n=SAMPLES if temperature else 1, seed=3
    )
    assert k == 0 or engine.metrics()["drafted"] > 0, "nothing was drafted: the test would be idle"
    return rollouts


def exact_rows(policy: Policy, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probabilities of every next token along a rollout: [T, V]."""
    ids = torch.tensor([rollout.prompt_ids + rollout.tokens])
    with torch.no_grad():
        logits = policy.model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits.double() / (temperature or 1.0), -1)


def check_logprobs(policy: Policy, rollouts: list[Rollout], temperature: float) -> None:
    for rollout in rollouts:
        own = exact_rows(policy, rollout, temperature).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs).double(), own, atol=1e-4, rtol=0)


def p_value(policy: Policy, rollouts: list[Rollout], temperature: float) -> float:
    """Of u being uniform."""
    source, values = np.random.default_rng(0), []
    for rollout in rollouts:
        p = exact_rows(policy, rollout, temperature).exp()
        own = p.gather(1, torch.tensor(rollout.tokens)[:, None])
        above = (p * (p > own)).sum(1).numpy()
        values.append(above + source.random(len(above)) * own[:, 0].numpy())
    u = np.concatenate(values)
    counts = np.bincount(np.clip((u * CELLS).astype(int), 0, CELLS - 1), minlength=CELLS).astype(float)
    return chi_square_tail(*pooled_chi_square(counts, np.full(CELLS, len(u) / CELLS)))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.3])
def test_plain(unsure: Policy, temperature: float) -> None:
    rollouts = rollouts_of(unsure, None, 0, temperature, "block")
    check_logprobs(unsure, rollouts, temperature)
    assert temperature == 0 or p_value(unsure, rollouts, temperature) > LEVEL


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.3])
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_speculative(
    unsure: Policy, make: Callable[[str], Drafter], name: str, rule: str, temperature: float, k: int
) -> None:
    rollouts = rollouts_of(unsure, make(name), k, temperature, rule)
    check_logprobs(unsure, rollouts, temperature)
    if temperature == 0:
        plain = rollouts_of(unsure, None, 0, temperature, rule)
        assert [r.tokens for r in rollouts] == [r.tokens for r in plain]
    else:
        assert p_value(unsure, rollouts, temperature) > LEVEL


def smallest_uniforms(inputs: VerifyInput) -> VerifyInput:
    return replace(inputs, accept_uniforms=torch.full_like(inputs.accept_uniforms, 1e-12))


def accept_all(rule: str, inputs: VerifyInput) -> VerifyResult:
    """Every draft is accepted that the policy does not forbid."""
    return verify(rule, smallest_uniforms(inputs))


def accept_all_of_tree(rule: str, inputs: VerifyInput) -> TreeResult:
    """The same for trees: the first child is accepted."""
    return verify_tree(rule, smallest_uniforms(inputs))


@pytest.mark.parametrize("name", DRAFTERS)
def test_accepting_every_draft_is_caught(unsure: Policy, make: Callable[[str], Drafter], name: str) -> None:
    rollouts = rollouts_of(
        unsure, make(name), 3, 1.0, "walk" if name == "graft" else "token", accept_all, accept_all_of_tree
    )
    assert p_value(unsure, rollouts, 1.0) < LEVEL
