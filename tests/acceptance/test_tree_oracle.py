"""Losslessness of the tree rules by enumeration: as mathematics, and of the torch code that implements them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import pytest
import torch

from chi_square import sigmas_of_detection
from forerun.acceptance.tree import TREE_RULES, TreeRuleFunction
from proofs.broken_tree import BROKEN_TREE, pruned
from proofs.oracle import (
    Law,
    Model,
    Text,
    block_rule,
    expected_accepted,
    fixed_length,
    greedy_model,
    random_model,
    sampled_proposals,
    target_law,
    token_rule,
    total_variation,
)
from proofs.tree_oracle import (
    TREE_EXACT,
    DraftTree,
    Shape,
    TreeCells,
    drawn_trees,
    fixed_shape,
    growing_shape,
    results_at,
    torch_tree_law,
    tree_cells,
    tree_expected_accepted,
    tree_law,
    tree_round,
    without_q,
)
from verify_inputs import DRAWN

TORCH_TOLERANCE = 1e-6  # float32 logits; measured below 1e-7


def all_parents(nodes: int, depth: int = 3, siblings: int = 3) -> Iterator[Text]:
    """Every tree in every order of its slots."""
    for parents in product(*(range(-1, slot) for slot in range(nodes))):
        below = {-1: 0}
        for slot, parent in enumerate(parents):
            below[slot] = below[parent] + 1
        if max(below.values()) <= depth and all(parents.count(parent) <= siblings for parent in parents):
            yield parents


def depth_of(trees: list[DraftTree]) -> int:
    return max(len(tree.path(row)) for tree in trees for row in range(len(tree.p)))


def law_of(rule: str, trees: list[DraftTree], target: Model) -> tuple[Law, Law]:
    """What one round and the target after it emit, and what the target alone emits."""
    length = depth_of(trees) + 1
    return tree_law(TREE_EXACT[rule], trees, target, length), target_law(target, length)


def models(seed: int, size: int, zeros: bool = False) -> tuple[Model, Model]:
    return random_model(seed, size, zeros), random_model(seed + 50, size)


# --- the rules as mathematics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rule", TREE_EXACT)
def test_every_rule_emits_the_target_law_exactly(rule: str, nodes: int) -> None:
    """All 125 trees of up to 5 nodes and depth 3, in all orders of slots, V = 3; up to 4 nodes also V = 2 and zeros."""
    for parents in all_parents(nodes):
        for size, zeros in [(3, False)] if nodes == 5 else [(3, False), (3, True), (2, True)]:
            target, draft = models(nodes, size, zeros)
            one, other = law_of(rule, drawn_trees(target, draft, fixed_shape(parents), DRAWN[rule]), target)
            assert one == other, (parents, size, zeros)


@pytest.mark.parametrize("rule", TREE_EXACT)
def test_drafts_with_zeros_stay_exact(rule: str) -> None:
    """Where q allows fewer tokens than siblings were asked for, the tree ends there."""
    for parents in all_parents(3):
        target, draft = random_model(1, 3, zeros=True), random_model(52, 3, zeros=True)
        one, other = law_of(rule, drawn_trees(target, draft, fixed_shape(parents), DRAWN[rule]), target)
        assert one == other, parents


FULL = (-1, -1, 0, 1, 2)  # two siblings, a child each, a grandchild


def by_ancestors(parents: Text, tokens: Text) -> int | None:
    """A second child of the root always; children only below the token 0."""
    if len(tokens) < 2:
        return -1
    return next((slot for slot, token in enumerate(tokens) if token == 0 and slot not in parents), None)


DYNAMIC: dict[str, Shape] = {
    "slots go on while the tokens before are even in sum": growing_shape(FULL, lambda _, tokens: sum(tokens) % 2 == 0),
    "children of likely ancestors only": lambda parents, tokens: (
        by_ancestors(parents, tokens) if len(tokens) < 5 else None
    ),
    "a sibling after an odd one": growing_shape((-1, -1, -1, 0), lambda _, tokens: tokens[-1:] != (0,)),
    "a first sibling's child after a cousin": growing_shape((-1, -1, 1, 0, 2), lambda _, tokens: tokens[1:2] != (2,)),
    "a cousin's child after a first sibling's child": growing_shape(
        (-1, -1, 0, 1, 3), lambda _, tokens: tokens[2:3] != (1,)
    ),
}


@pytest.mark.parametrize("shape", DYNAMIC)
@pytest.mark.parametrize("rule", TREE_EXACT)
def test_shapes_that_see_only_earlier_slots_stay_exact(rule: str, shape: str) -> None:
    for seed in range(3):
        target, draft = models(seed, 3)
        trees = drawn_trees(target, draft, DYNAMIC[shape], DRAWN[rule])
        one, other = law_of(rule, trees, target)
        assert one == other
        if DRAWN[rule] == "sampled":
            assert len({len(tree.tokens) for tree in trees}) > 1  # the shape did depend on the tokens


@pytest.mark.parametrize("rule", ["rrs", "traversal", "best_sampled"])
def test_pruning_by_the_sampled_q_is_never_lossless(rule: str) -> None:
    """Siblings less likely than 1/3 are dropped once drawn: 2 % or more in total variation on every model."""
    for seed in (0, 1, 3):
        target, draft = models(seed, 3)
        trees = pruned(drawn_trees(target, draft, fixed_shape(FULL), DRAWN[rule]), lambda q, _: q >= Fraction(1, 3))
        assert total_variation(*law_of(rule, trees, target)) > 0.02


def test_pruning_what_is_deterministic_is_lossless_and_the_walk_survives_any_tree() -> None:
    target, draft = models(5, 3)

    def keeps(q, text):
        return q >= Fraction(1, 3)

    for siblings in ("top", "best", "sampled"):
        one, other = law_of("walk", pruned(drawn_trees(target, draft, fixed_shape(FULL), siblings), keeps), target)
        assert one == other


def test_the_known_violation_of_anticipation() -> None:
    """p = q = (.7, .3), verified only if the favourite was sampled: (.91, .09), by every rule that knows q."""
    row = (Fraction(7, 10), Fraction(3, 10))
    trees = pruned(drawn_trees(lambda _: row, lambda _: row, fixed_shape((-1,))), lambda q, _: q > Fraction(1, 2))
    for rule in ("rrs", "traversal"):
        assert tree_law(TREE_EXACT[rule], trees, lambda _: row, 1) == {(0,): Fraction(91, 100), (1,): Fraction(9, 100)}


def test_fixed_tokens_judged_as_sampled_are_caught() -> None:
    for rule, siblings in product(("rrs", "traversal"), ("top", "best")):
        for seed in (2, 5, 6):
            target, draft = models(seed, 3)
            trees = drawn_trees(target, draft, fixed_shape(FULL), siblings)
            assert total_variation(*law_of(rule, trees, target)) > 0.05


def test_a_sampled_eldest_may_be_judged_as_fixed() -> None:
    target, draft = models(5, 3)
    one, other = law_of("best_sampled", drawn_trees(target, draft, fixed_shape(FULL)), target)
    assert one == other


# --- how much they accept ---------------------------------------------------------------------------------------------


def accepted(rule: str, parents: Text, seed: int) -> Fraction:
    target, draft = models(seed, 3)
    return tree_expected_accepted(TREE_EXACT[rule], drawn_trees(target, draft, fixed_shape(parents), DRAWN[rule]))


def test_a_chain_is_block_verification_and_the_token_rule() -> None:
    """Sun et al. 2403.10444, section 3: 10/9 and 11/9 tokens; and chains of three on random models."""
    p, q = (Fraction(1, 3), Fraction(2, 3)), (Fraction(2, 3), Fraction(1, 3))
    trees = drawn_trees(lambda _: p, lambda _: q, fixed_shape((-1, 0)))
    assert tree_expected_accepted(TREE_EXACT["rrs"], trees) == Fraction(10, 9)
    assert tree_expected_accepted(TREE_EXACT["traversal"], trees) == Fraction(11, 9)
    for seed in range(6):
        target, draft = models(seed, 3)
        chain = sampled_proposals(draft, 3)
        assert accepted("rrs", (-1, 0, 1), seed) == expected_accepted(token_rule, target, chain, fixed_length(3))
        assert accepted("traversal", (-1, 0, 1), seed) == expected_accepted(block_rule, target, chain, fixed_length(3))


def test_a_second_sibling_never_costs_acceptance() -> None:
    """p = (1/2, 1/2, 0), q = (1/4, 1/4, 1/2): one child is accepted with 1/2, and the second always after it."""
    p, q = (Fraction(1, 2), Fraction(1, 2), Fraction(0)), (Fraction(1, 4), Fraction(1, 4), Fraction(1, 2))
    for parents, share in (((-1,), Fraction(1, 2)), ((-1, -1), Fraction(1))):
        trees = drawn_trees(lambda _: p, lambda _: q, fixed_shape(parents))
        assert tree_expected_accepted(TREE_EXACT["rrs"], trees) == share
    for seed in range(10):
        chain, wide = accepted("rrs", (-1, 0, 1), seed), accepted("rrs", (-1, 0, 1, -1, 0), seed)
        assert wide > chain


TRAVERSAL_GAIN = {  # parents: mean accepted tokens of recursive rejection and of traversal over ten random models
    (-1, -1, 0, 1): (1.4836, 1.5361),
    (-1, 0, 1, -1, 3): (1.9247, 2.0604),
    (-1, -1, 0, 0, 1): (1.5928, 1.6193),
    (-1, 0, 0, 2): (1.5135, 1.5249),
}


@pytest.mark.parametrize("parents", TRAVERSAL_GAIN)
def test_traversal_accepts_at_least_as_much_on_average(parents: Text) -> None:
    """On average over models; on a single one it may accept less, as the test below shows."""
    means = [sum(accepted(rule, parents, seed) for seed in range(10)) / 10 for rule in ("rrs", "traversal")]
    assert means[1] > means[0]
    assert [float(mean) for mean in means] == pytest.approx(TRAVERSAL_GAIN[parents], abs=5e-5)


def test_traversal_may_accept_less_on_a_single_model() -> None:
    gains = [accepted("traversal", (-1, 0, 0, 2), seed) - accepted("rrs", (-1, 0, 0, 2), seed) for seed in range(10)]
    assert min(gains) < 0 < sum(gains)


# --- the torch code ---------------------------------------------------------------------------------------------------


def torch_distance(
    rule: TreeRuleFunction, target: Model, trees: list[DraftTree], temperature: float = 1.0
) -> tuple[float, TreeCells]:
    cells, length = tree_cells(rule, tree_round(trees, temperature)), depth_of(trees) + 1
    return total_variation(torch_tree_law(cells, trees, target, length), target_law(target, length)), cells


def mean_accepted(cells: TreeCells, trees: list[DraftTree]) -> float:
    """Expected accepted count; equal laws do not make it equal to the rational rule's."""
    depths = torch.zeros(len(trees), max(len(tree.p) for tree in trees))
    for index, tree in enumerate(trees):
        depths[index, : len(tree.p)] = torch.tensor([len(tree.path(row)) for row in range(len(tree.p))])
    chances = torch.tensor([float(tree.probability) for tree in trees], dtype=torch.float64)
    return float(((cells.volumes() * depths.gather(1, cells.last)).sum(1) * chances).sum())


def assert_predicts(cells: TreeCells, rule: TreeRuleFunction, trees: list[DraftTree]) -> None:
    """The oracle's table over uniforms is the code at random uniforms; so its integral is the code's."""
    given, generator = tree_round(trees), torch.Generator().manual_seed(1)
    accept = torch.rand(len(trees), 60, given.draft.tokens.shape[1], dtype=torch.float64, generator=generator)
    residual = torch.rand(len(trees), 60, dtype=torch.float64, generator=generator)
    last, following = results_at(rule, given, accept, residual)
    for setting in range(60):
        predicted = cells.predict(accept[:, setting], residual[:, setting])
        assert torch.equal(predicted[0], last[:, setting]) and torch.equal(predicted[1], following[:, setting])


TORCH_CASES = {  # size, zeros, temperature, shape
    "one node": (3, True, 1.0, fixed_shape((-1,))),
    "three siblings": (3, False, 0.7, fixed_shape((-1, -1, -1))),
    "two levels": (3, True, 1.0, fixed_shape((-1, 0, -1, 0))),
    "five nodes": (2, False, 1.3, fixed_shape((-1, -1, 0, 2, 1))),
    "dynamic": (2, False, 1.0, growing_shape((-1, -1, 1, 0, 2), lambda _, tokens: tokens[1:3] != (1, 0))),
}


@pytest.mark.parametrize("case", TORCH_CASES)
@pytest.mark.parametrize("rule", TREE_RULES)
def test_the_torch_rules_emit_the_target_law(rule: str, case: str) -> None:
    size, zeros, temperature, shape = TORCH_CASES[case]
    target, draft = models(4, size, zeros)
    trees = drawn_trees(target, draft, shape, DRAWN[rule])
    distance, cells = torch_distance(TREE_RULES[rule], target, trees, temperature)
    assert distance < TORCH_TOLERANCE
    expected = float(tree_expected_accepted(TREE_EXACT[rule], trees))
    assert mean_accepted(cells, trees) == pytest.approx(expected, abs=TORCH_TOLERANCE)
    if temperature == 1.0:
        assert_predicts(cells, TREE_RULES[rule], trees)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_the_torch_rules_are_lossless_at_temperature_zero(rule: str) -> None:
    target, draft = models(3, 3)
    trees = drawn_trees(target, draft, fixed_shape((-1, -1, 0, 1)), DRAWN[rule])
    cells = tree_cells(TREE_RULES[rule], tree_round(trees, temperature=0.0))
    assert torch_tree_law(cells, trees, greedy_model(target), 3) == target_law(greedy_model(target), 3)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_the_torch_rules_are_lossless_with_a_smaller_draft_vocabulary(rule: str) -> None:
    target, narrow = random_model(8, 4), random_model(58, 3)

    def draft(text: Text) -> tuple[Fraction, ...]:
        some = narrow(text)
        return (Fraction(0), some[0], some[1], some[2])

    trees = drawn_trees(target, draft, fixed_shape((-1, -1, 0)), DRAWN[rule])
    cells = tree_cells(TREE_RULES[rule], tree_round(trees, vocabulary=(1, 2, 3)))
    assert total_variation(torch_tree_law(cells, trees, target, 3), target_law(target, 3)) < TORCH_TOLERANCE


# --- faults -----------------------------------------------------------------------------------------------------------

# The faults are weakest where the model is kindest to them; on this pair and tree each moves at least 1 % of the mass.
FAULT_TARGET, FAULT_DRAFT, FAULT_PARENTS = random_model(22, 3), random_model(122, 3), (-1, -1, 0, 1)
SAMPLED_ROUNDS = 200_000  # with which test_tree_laws.py must see every one of them, too
FAULT_DISTANCE = {
    "top_k_as_sampled": 0.4908,
    "best_as_sampled": 0.3492,
    "no_residual": 0.1275,
    "siblings_verified_by_target": 0.0444,
    "sibling_q_not_renormalised": 0.0333,
    "typical_acceptance": 0.4745,
    "shared_sibling_uniform": 0.0143,
    "parent_row_off_by_one": 0.2813,
    "peeking_pruning": 0.1077,
    "traversal_peeking_pruning": 0.1308,
    "traversal_threshold_is_weight": 0.1400,
    "traversal_siblings_unmoved": 0.0444,
    "traversal_residual_unweighted": 0.0111,
    "walk_no_residual": 0.2832,
}


@pytest.mark.parametrize("name", BROKEN_TREE, ids=lambda name: f"{name}-TV={FAULT_DISTANCE[name]}")
def test_every_broken_rule_is_caught(name: str) -> None:
    fault = BROKEN_TREE[name]
    trees = drawn_trees(FAULT_TARGET, FAULT_DRAFT, fixed_shape(FAULT_PARENTS), fault.siblings)
    trees = trees if fault.with_q else without_q(trees)
    cells, right = tree_cells(fault.rule, tree_round(trees)), target_law(FAULT_TARGET, 3)
    law = torch_tree_law(cells, trees, FAULT_TARGET, 3)
    distance = total_variation(law, right)
    assert distance == pytest.approx(FAULT_DISTANCE[name], abs=5e-5)
    assert distance > 0.01 > 1000 * TORCH_TOLERANCE
    chi_square = sum((law.get(text, Fraction(0)) - right[text]) ** 2 / right[text] for text in right)
    assert sigmas_of_detection(SAMPLED_ROUNDS, len(right), float(chi_square)) > 5
    assert_predicts(cells, fault.rule, trees)
