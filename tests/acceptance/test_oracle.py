"""Losslessness by enumeration: of the rules as mathematics, and of the torch code that implements them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from forerun.acceptance.broken import BROKEN, SHOW_WITH_ONE_HOT
from forerun.acceptance.chain import RuleFunction
from forerun.types import Draft, VerifyInput, VerifyResult
from proofs.oracle import (
    CHAIN_RULES,
    Admission,
    ChainRule,
    Model,
    Proposal,
    block_rule,
    cells_of,
    expected_accepted,
    fixed_length,
    greedy_model,
    one_hot_proposals,
    peeking,
    random_model,
    rule_law,
    sampled_proposals,
    stopping_time,
    target_law,
    token_rule,
    torch_law,
    torch_round,
    total_variation,
)

EXACT: dict[str, ChainRule] = {"token": token_rule, "block": block_rule}
TORCH_TOLERANCE = 1e-6  # float32 logits; measured below 1e-7
ADMISSIONS: dict[str, Admission] = {
    "fixed": fixed_length(3),
    "stopping": stopping_time(lambda before: sum(before) % 2 == 0),
    "one slot": stopping_time(lambda before: len(before) == 0),
    "none": stopping_time(lambda before: False),
}
PEEK = peeking(lambda tokens: tokens[-1] != 0)


def torch_distance(
    rule: RuleFunction, target: Model, proposals: list[Proposal], admit: Admission, temperature: float = 1.0
) -> float:
    k = len(proposals[0].path)
    law = torch_law(rule, torch_round(target, proposals, admit, temperature), proposals, target, k + 1)
    return total_variation(law, target_law(target, k + 1))


@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize("proposal", [sampled_proposals, one_hot_proposals])
@pytest.mark.parametrize("rule", EXACT)
def test_every_rule_emits_the_target_law_exactly(rule: str, proposal, admission: str) -> None:
    for size, k, seed in ((2, 1, 1), (2, 2, 2), (2, 3, 3), (3, 1, 4), (3, 2, 5), (3, 3, 6)):
        for zeros in (False, True):
            target, draft = random_model(seed, size, zeros), random_model(seed + 50, size)
            law = rule_law(EXACT[rule], target, proposal(draft, k), ADMISSIONS[admission], k + 1)
            assert law == target_law(target, k + 1), (size, k, zeros)


@pytest.mark.parametrize("rule", EXACT)
def test_peeking_at_the_sampled_token_is_never_lossless(rule: str) -> None:
    for size, k, seed in ((2, 2, 2), (3, 2, 5), (3, 3, 6)):
        target, draft = random_model(seed, size), random_model(seed + 50, size)
        law = rule_law(EXACT[rule], target, sampled_proposals(draft, k), PEEK, k + 1)
        assert total_variation(law, target_law(target, k + 1)) > 0.02
        law = rule_law(EXACT[rule], target, one_hot_proposals(draft, k), PEEK, k + 1)
        assert law == target_law(target, k + 1)  # what is deterministic may be ranked freely


def test_the_known_violation_of_anticipation() -> None:
    """p = q = (.7, .3), verified only if the favourite was sampled: (.91, .09)."""
    row = (Fraction(7, 10), Fraction(3, 10))
    law = rule_law(token_rule, lambda _: row, sampled_proposals(lambda _: row, 1), peeking(lambda t: t[-1] == 0), 1)
    assert law == {(0,): Fraction(91, 100), (1,): Fraction(9, 100)}


def test_block_accepts_as_much_as_published_and_never_less_than_token() -> None:
    """Sun et al. 2403.10444, section 3: p = (1/3, 2/3), q = (2/3, 1/3), two slots: 10/9 and 11/9."""
    p, q = (Fraction(1, 3), Fraction(2, 3)), (Fraction(2, 3), Fraction(1, 3))
    proposals = sampled_proposals(lambda _: q, 2)
    assert expected_accepted(token_rule, lambda _: p, proposals, fixed_length(2)) == Fraction(10, 9)
    assert expected_accepted(block_rule, lambda _: p, proposals, fixed_length(2)) == Fraction(11, 9)
    for seed in range(6):
        target, proposals = random_model(seed, 3), sampled_proposals(random_model(seed + 50, 3), 3)
        for admit in ADMISSIONS.values():
            token = expected_accepted(token_rule, target, proposals, admit)
            assert expected_accepted(block_rule, target, proposals, admit) >= token


def test_one_hot_drafts_are_accepted_equally_by_both_rules() -> None:
    for seed in range(6):
        target, proposals = random_model(seed, 3), one_hot_proposals(random_model(seed + 50, 3), 3)
        token = expected_accepted(token_rule, target, proposals, fixed_length(3))
        assert expected_accepted(block_rule, target, proposals, fixed_length(3)) == token


@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize("proposal", [sampled_proposals, one_hot_proposals])
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_the_torch_rules_emit_the_target_law(rule: str, proposal, admission: str) -> None:
    for size, k, zeros, temperature in ((2, 1, False, 1.0), (2, 3, False, 0.7), (3, 2, True, 1.0), (3, 3, False, 1.0)):
        target, proposals = random_model(k, size, zeros), proposal(random_model(k + 50, size), k)
        assert (
            torch_distance(CHAIN_RULES[rule], target, proposals, ADMISSIONS[admission], temperature) < TORCH_TOLERANCE
        )


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_the_torch_rules_are_lossless_at_temperature_zero(rule: str) -> None:
    for proposal in (sampled_proposals, one_hot_proposals):
        model, proposals = random_model(3, 3), proposal(random_model(53, 3), 3)
        given = torch_round(model, proposals, fixed_length(3), temperature=0.0)
        law = torch_law(CHAIN_RULES[rule], given, proposals, greedy_model(model), 4)
        assert law == target_law(greedy_model(model), 4)


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_the_torch_rules_are_lossless_with_a_smaller_draft_vocabulary(rule: str) -> None:
    target, narrow = random_model(8, 4), random_model(58, 2)

    def draft(text: tuple[int, ...]) -> tuple[Fraction, ...]:
        some = narrow(text)
        return (Fraction(0), some[0], Fraction(0), some[1])

    proposals = sampled_proposals(draft, 2)
    given = torch_round(target, proposals, ADMISSIONS["fixed"], vocabulary=(1, 3))
    law = torch_law(CHAIN_RULES[rule], given, proposals, target, 3)
    assert total_variation(law, target_law(target, 3)) < TORCH_TOLERANCE


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_draft_equal_to_the_target_is_accepted_whole(rule: str) -> None:
    target = random_model(4, 3)
    proposals = sampled_proposals(target, 3)
    given = torch_round(target, proposals, fixed_length(3))
    u = torch.full((len(proposals), 3), 1 - 1e-5, dtype=torch.float64)
    verdict = CHAIN_RULES[rule](given.inputs(u, u[:, 0]))
    assert bool((verdict.accepted == 3).all())
    assert torch_distance(CHAIN_RULES[rule], target, proposals, fixed_length(3)) < TORCH_TOLERANCE


def test_a_sampled_draft_may_be_verified_as_one_hot() -> None:
    """Forgetting q costs acceptance and nothing else: given the token, the rule is exact."""

    def forgetful(inputs: VerifyInput) -> VerifyResult:
        return CHAIN_RULES["token"](replace(inputs, draft=Draft(inputs.draft.tokens, inputs.draft.lengths)))

    assert torch_distance(forgetful, random_model(1, 3), sampled_proposals(random_model(51, 3), 2), fixed_length(2)) < (
        TORCH_TOLERANCE
    )


def test_torch_and_rational_rules_accept_equally() -> None:
    """Their laws are equal by losslessness; how much they accept must be equal too."""
    for name, exact in EXACT.items():
        for seed in range(2):
            target, proposals = random_model(seed, 3), sampled_proposals(random_model(seed + 50, 3), 3)
            for admit in (ADMISSIONS["fixed"], ADMISSIONS["stopping"]):
                cells = cells_of(CHAIN_RULES[name], torch_round(target, proposals, admit))
                weights = torch.tensor([float(one.probability) for one in proposals], dtype=torch.float64)
                accepted = ((cells.volumes() * cells.accepted).sum(1) * weights).sum()
                assert float(accepted) == pytest.approx(
                    float(expected_accepted(exact, target, proposals, admit)), abs=TORCH_TOLERANCE
                )


# The faults are weakest where the model is kindest to them; on this pair each moves at least 1 % of the mass.
FAULT_TARGET, FAULT_DRAFT = random_model(7, 4), random_model(107, 4)


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_rule_is_caught(name: str) -> None:
    proposals = sampled_proposals(FAULT_DRAFT, 2)
    distance = torch_distance(BROKEN[name], FAULT_TARGET, proposals, fixed_length(2))
    assert distance > 0.009 > 1000 * TORCH_TOLERANCE


@pytest.mark.parametrize("name", BROKEN)
def test_the_faults_marked_so_show_with_one_hot_drafts_and_no_others(name: str) -> None:
    proposals = one_hot_proposals(FAULT_DRAFT, 2)
    distance = torch_distance(BROKEN[name], FAULT_TARGET, proposals, fixed_length(2))
    assert distance > 0.009 if name in SHOW_WITH_ONE_HOT else distance < TORCH_TOLERANCE


def test_peeking_is_caught_in_the_torch_rules() -> None:
    for rule in CHAIN_RULES.values():
        assert torch_distance(rule, FAULT_TARGET, sampled_proposals(FAULT_DRAFT, 2), PEEK) > 0.02


@pytest.mark.parametrize("name", [*CHAIN_RULES, *BROKEN])
def test_the_recovered_table_is_the_rule(name: str) -> None:
    """The oracle's table over uniforms predicts the code at random uniforms; so its integral is the code's."""
    rule = {**CHAIN_RULES, **BROKEN}[name]
    for proposals in (sampled_proposals(FAULT_DRAFT, 2), one_hot_proposals(FAULT_DRAFT, 3)):
        given = torch_round(FAULT_TARGET, proposals, ADMISSIONS["fixed"])
        cells = cells_of(rule, given)
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            accept = torch.rand(given.draft.tokens.shape, dtype=torch.float64, generator=generator)
            residual = torch.rand(len(accept), dtype=torch.float64, generator=generator)
            verdict = rule(given.inputs(accept, residual))
            accepted, following = cells.predict(accept, residual)
            assert torch.equal(verdict.accepted, accepted)
            assert torch.equal(verdict.tokens.gather(1, accepted[:, None])[:, 0], following)
