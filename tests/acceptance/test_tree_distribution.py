"""The tree rules in distribution, by sampling.

A round and its completion by the target give as many tokens as the tree is deep, and one: their joint counts are
tested against the exact law at level 1e-7, so that all tests of this file together fail by chance less than once in
300,000 runs. Every fault lies 5 standard deviations or more above the critical value: test_tree_oracle.py computes it.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from chi_square import LEVEL, p_value, sigmas_of_detection
from forerun.acceptance.random import Purpose, inverse_cdf, inverse_cdf_log, uniforms
from forerun.acceptance.tree import TREE_RULES, TreeRuleFunction, verify_tree
from forerun.types import Draft, VerifyInput
from proofs.broken_tree import BROKEN_TREE
from proofs.oracle import CHAIN_RULES, Model, Text, random_model, target_law
from verify_inputs import DRAWN, drawn_columns, rand, randn

Case = tuple[Model, Model, int, Text, int]  # target, drafter, V, parents, rounds
FAULTY: Case = (random_model(22, 3), random_model(122, 3), 3, (-1, -1, 0, 1), 200_000)  # as in test_tree_oracle.py
DEEP: Case = (random_model(7, 4), random_model(107, 4), 4, (-1, -1, 0, 1, 2, 2), 200_000)


@cache
def table(model: Model, size: int, depth: int) -> Tensor:
    """The model's rows after every text of `depth` tokens: [size**depth, size]."""
    rows = [[float(value) for value in model(text)] for text in product(range(size), repeat=depth)]
    return torch.tensor(rows, dtype=torch.float64)


def index(texts: Tensor, size: int) -> Tensor:
    """Number of every text [N, n] in base `size`: [N]."""
    place = size ** torch.arange(texts.shape[1] - 1, -1, -1)
    return (texts * place).sum(1)


def draws(purpose: Purpose, rounds: int, columns: int) -> Tensor:
    return uniforms(torch.arange(rounds) + 10_000_000, torch.arange(columns).expand(rounds, -1), purpose)


@cache
def drawn_rounds(given: Case, drawn: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draft tokens [N, k], the rows they came from [N, k, V] as logarithms, and target logits [N, k+1, V]."""
    target, drafter, size, parents, rounds = given
    u, texts = draws(Purpose.DRAFT, rounds, len(parents)), [torch.zeros(rounds, 0, dtype=torch.int64)]
    columns, q_rows = torch.zeros(rounds, 0, dtype=torch.int64), []
    for slot, parent in enumerate(parents):
        above = texts[parent + 1]
        q_rows.append(table(drafter, size, above.shape[1])[index(above, size)])
        earlier = [other for other in range(slot) if parents[other] == parent]
        left = q_rows[-1].scatter(1, columns[:, earlier], 0.0)
        fixed = drawn == "top" or (drawn == "best" and not earlier)
        chosen = left.argmax(1) if fixed else inverse_cdf(left, u[:, slot])
        columns = torch.cat([columns, chosen[:, None]], 1)
        texts.append(torch.cat([above, chosen[:, None]], 1))
    logits = torch.stack([table(target, size, text.shape[1])[index(text, size)].log() for text in texts], 1)
    return columns, torch.stack(q_rows, 1).log().float(), logits.float()


def counts(rule: TreeRuleFunction, given: Case, drawn: str, with_q: bool = True, shape: str = "whole") -> Tensor:
    """How often every text came out: [V**length]."""
    target, _, size, parents, rounds = given
    tokens, log_q, logits = drawn_rounds(given, drawn)
    k = len(parents)
    lengths = torch.full((rounds,), k)
    if shape == "stopping":  # the third slot is drafted if the two before it are even in sum, and all later with it
        lengths = torch.where(tokens[:, :2].sum(1) % 2 == 0, k, 2)
    if shape == "peeking":
        lengths = torch.where(tokens[:, 0] == 0, 0, k)
    draft = Draft(tokens, lengths, log_q if with_q else None, parents=torch.tensor(parents).expand(rounds, -1))
    accept, residual = draws(Purpose.ACCEPT, rounds, k), draws(Purpose.RESIDUAL, rounds, 1)[:, 0]
    verdict = rule(VerifyInput(logits, draft, torch.ones(rounds), accept, residual))
    length = depth_of(parents) + 1
    texts = torch.nn.functional.pad(verdict.tokens, (0, length - verdict.tokens.shape[1]))
    u = draws(Purpose.PLAIN, rounds, length)
    for place in range(1, length):
        plain = inverse_cdf(table(target, size, place)[index(texts[:, :place], size)], u[:, place])
        texts[:, place] = torch.where(place <= verdict.accepted, texts[:, place], plain)
    return index(texts, size).bincount(minlength=size**length)


def depth_of(parents: Text) -> int:
    below = {-1: 0}
    for slot, parent in enumerate(parents):
        below[slot] = below[parent] + 1
    return max(below.values())


@cache
def law(given: Case) -> Tensor:
    target, _, size, parents, _ = given
    length = depth_of(parents) + 1
    exact = target_law(target, length)
    return torch.tensor([float(exact[text]) for text in product(range(size), repeat=length)], dtype=torch.float64)


def test_the_power_of_the_sampled_test() -> None:
    """200,000 rounds see a law that is 1.5 % away in the 27 cells of the faults, 2 % in the 256 of the deep tree."""
    assert sigmas_of_detection(200_000, 27, 4 * 0.015**2) > 4
    assert sigmas_of_detection(200_000, 256, 4 * 0.02**2) > 4


@pytest.mark.parametrize("shape", ["whole", "stopping"])
@pytest.mark.parametrize("rule", TREE_RULES)
def test_sampled_rounds_follow_the_target(rule: str, shape: str) -> None:
    assert p_value(counts(TREE_RULES[rule], DEEP, DRAWN[rule], shape=shape), law(DEEP)) > LEVEL


@pytest.mark.parametrize("rule", TREE_RULES)
def test_the_right_rules_pass_where_the_faults_fail(rule: str) -> None:
    assert p_value(counts(TREE_RULES[rule], FAULTY, DRAWN[rule]), law(FAULTY)) > LEVEL


@pytest.mark.parametrize("name", BROKEN_TREE)
def test_the_sampled_test_catches_every_broken_rule(name: str) -> None:
    fault = BROKEN_TREE[name]
    assert p_value(counts(fault.rule, FAULTY, fault.siblings, fault.with_q), law(FAULTY)) < LEVEL


@pytest.mark.parametrize("rule", ["rrs", "traversal"])
def test_the_sampled_test_catches_a_shape_that_peeks(rule: str) -> None:
    assert p_value(counts(TREE_RULES[rule], FAULTY, "sampled", shape="peeking"), law(FAULTY)) < LEVEL
    assert p_value(counts(TREE_RULES["walk"], FAULTY, "sampled", shape="peeking"), law(FAULTY)) > LEVEL


@pytest.mark.parametrize("rule", TREE_RULES)
def test_a_wide_vocabulary_follows_the_target(rule: str) -> None:
    """First two tokens of a round over V = 64 with D = 40, two children and one grandchild each."""
    rounds, size, vocabulary = 50_000, 64, torch.arange(64)[torch.arange(64) % 8 < 5]
    first, second = randn(size, seed=1) * 1.5, randn(size, size, seed=2) * 1.5
    near = (first[vocabulary] + randn(40, seed=3) * 0.6).log_softmax(0)
    far = (second[vocabulary][:, vocabulary] * 0.8).log_softmax(1)
    parents = torch.tensor([-1, -1, 0, 1]).expand(rounds, -1)
    top = drawn_columns(near.expand(rounds, 3, -1), parents[:, :2], DRAWN[rule], rand(rounds, 2, seed=4))
    q = torch.stack([near.expand(rounds, -1), far[top[:, 0]], far[top[:, 1]]], 1)
    below = inverse_cdf_log(q[:, 1:].flatten(0, 1), rand(rounds * 2, seed=5)).view(rounds, 2)
    if DRAWN[rule] != "sampled":
        below = q[:, 1:].argmax(2)
    tokens = vocabulary[torch.cat([top, below], 1)]
    logits = torch.cat([first.expand(rounds, 1, -1), second[tokens[:, :2]], torch.zeros(rounds, 2, size)], 1)
    draft = Draft(tokens, torch.full((rounds,), 4), q[:, [0, 0, 1, 2]], vocabulary, parents)
    accept, residual = rand(rounds, 4, seed=6), rand(rounds, seed=7)
    result = verify_tree(rule, VerifyInput(logits, draft, torch.ones(rounds), accept, residual))
    start = result.tokens[:, 0]
    plain = inverse_cdf_log(second[start], rand(rounds, seed=8))
    texts = start * size + torch.where(result.accepted > 0, result.tokens[:, 1], plain)
    joint = first.double().softmax(0)[:, None] * second.double().softmax(1)
    seen = texts.bincount(minlength=size**2).view(size, size)
    assert p_value(seen.sum(1), joint.sum(1)) > LEVEL
    assert p_value(seen.sum(0), joint.sum(0)) > LEVEL
    assert p_value(seen.flatten(), joint.flatten()) > LEVEL


def test_a_tree_accepts_more_than_its_first_path_and_traversal_most() -> None:
    tokens, log_q, logits = drawn_rounds(FAULTY, "sampled")
    rounds = len(tokens)
    path = Draft(tokens[:, [0, 2]], torch.full((rounds,), 2), log_q[:, [0, 2]])
    accept, residual = draws(Purpose.ACCEPT, rounds, 4), draws(Purpose.RESIDUAL, rounds, 1)[:, 0]
    inputs = VerifyInput(logits[:, [0, 1, 3]], path, torch.ones(rounds), accept[:, [0, 2]], residual)
    chain = CHAIN_RULES["token"](inputs).accepted.double().mean()
    draft = Draft(tokens, torch.full((rounds,), 4), log_q, parents=torch.tensor(FAULTY[3]).expand(rounds, -1))
    inputs = VerifyInput(logits, draft, torch.ones(rounds), accept, residual)
    accepted = {rule: verify_tree(rule, inputs).accepted.double().mean() for rule in ("walk", "rrs", "traversal")}
    assert accepted["traversal"] > accepted["rrs"] > chain > accepted["walk"]
