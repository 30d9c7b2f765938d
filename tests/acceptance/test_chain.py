"""The chain rules against their references, in their corner cases, and in distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from chi_square import LEVEL, p_value, sigmas_of_detection
from forerun.acceptance.broken import BROKEN
from forerun.acceptance.chain import RuleFunction, verify
from forerun.acceptance.random import Purpose, inverse_cdf, inverse_cdf_log, uniforms
from forerun.types import Draft, VerifyInput, VerifyResult
from proofs.oracle import CHAIN_RULES, Model, random_model, target_law
from proofs.references import reference_block, reference_token
from verify_inputs import ALMOST_ONE, on_device, rand, randn, rows_of

REFERENCES = {"token": reference_token, "block": reference_block}


def case(
    batch: int, k: int, size: int, seed: int, vocabulary: Tensor | None = None, one_hot: bool = False
) -> VerifyInput:
    """Random input of a rule: ragged lengths, mixed temperatures, a draft that resembles the target."""
    logits = randn(batch, k + 1, size, seed=seed) * 2
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.6])[torch.arange(batch) % 4]
    wide = logits[:, :k] + randn(batch, k, size, seed=seed + 1) * 0.7
    log_q = (wide if vocabulary is None else wide[:, :, vocabulary]).log_softmax(-1)
    columns = inverse_cdf_log(log_q.flatten(0, 1), rand(batch * k, seed=seed + 2)).view(batch, k) if k else None
    tokens = torch.zeros(batch, 0, dtype=torch.int64) if columns is None else columns
    if vocabulary is not None:
        tokens = vocabulary[tokens]
    often_right = (rand(batch, k, seed=seed + 5) < 0.7) & (temperature == 0)[:, None]
    tokens = torch.where(often_right, logits[:, :k].argmax(2), tokens)
    lengths = (rand(batch, seed=seed + 3) * (k + 1)).long()
    draft = Draft(tokens, lengths, None if one_hot else log_q, None if one_hot else vocabulary)
    return VerifyInput(logits, draft, temperature, rand(batch, k, seed=seed + 4), rand(batch, seed=seed + 6))


def assert_same(one: VerifyResult, other: VerifyResult) -> None:
    assert torch.equal(one.accepted, other.accepted)
    assert torch.equal(one.tokens, other.tokens)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_rule_equals_its_reference(rule: str, k: int, one_hot: bool) -> None:
    inputs = case(300, k, 11, seed=100 * k, one_hot=one_hot)
    verdict = verify(rule, inputs)
    assert_same(verdict, REFERENCES[rule](inputs))
    assert verdict.tokens.dtype == torch.int64 and verdict.logprobs.dtype == torch.float32
    if k > 1:
        assert {0, 1, 2} <= set(verdict.accepted.tolist())


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_smaller_draft_vocabulary_equals_its_reference(rule: str) -> None:
    inputs = case(300, 3, 600, seed=7, vocabulary=torch.arange(0, 600, 7))
    assert_same(verify(rule, inputs), REFERENCES[rule](inputs))


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_masked_logits_equal_the_reference_and_are_never_emitted(rule: str) -> None:
    inputs = case(300, 3, 11, seed=9)
    masked = rand(*inputs.target_logits.shape, seed=10) < 0.4
    masked[:, :, 4] = False
    inputs = replace(inputs, target_logits=inputs.target_logits.masked_fill(masked, -torch.inf))
    verdict = verify(rule, inputs)
    assert_same(verdict, REFERENCES[rule](inputs))
    assert bool(verdict.logprobs.isfinite().all())


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_bfloat16_and_strided_logits_equal_the_reference(rule: str) -> None:
    inputs = case(200, 3, 300, seed=11)
    rough = replace(inputs, target_logits=inputs.target_logits.bfloat16())
    assert_same(verify(rule, rough), REFERENCES[rule](rough))
    strided = torch.empty(200, 300, 4).transpose(1, 2).copy_(inputs.target_logits)
    assert not strided.is_contiguous()
    assert_same(verify(rule, replace(inputs, target_logits=strided)), verify(rule, inputs))


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_verdict_does_not_depend_on_the_batch(rule: str) -> None:
    inputs = case(60, 3, 200, seed=12)
    whole = verify(rule, inputs)
    for part in (torch.arange(59, -1, -1), torch.tensor([17]), torch.arange(20, 43)):
        verdict = verify(rule, rows_of(inputs, part))
        assert torch.equal(verdict.tokens, whole.tokens[part])
        assert torch.equal(verdict.accepted, whole.accepted[part])
        torch.testing.assert_close(verdict.logprobs, whole.logprobs[part], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_what_lies_beyond_the_length_is_not_read(rule: str) -> None:
    inputs = case(100, 3, 11, seed=13)
    draft = inputs.draft
    assert draft.log_q is not None
    beyond = torch.arange(3) >= draft.lengths[:, None]
    rows = torch.arange(4) > draft.lengths[:, None]
    spoiled = Draft(
        draft.tokens.masked_fill(beyond, -1), draft.lengths, draft.log_q.masked_fill(beyond[..., None], torch.nan)
    )
    other = replace(
        inputs,
        target_logits=inputs.target_logits.masked_fill(rows[..., None], torch.nan),
        draft=spoiled,
        accept_uniforms=inputs.accept_uniforms.masked_fill(beyond, torch.nan),
    )
    assert_same(verify(rule, other), verify(rule, inputs))


def test_one_slot_makes_block_and_token_equal() -> None:
    inputs = case(300, 3, 11, seed=14)
    short = replace(inputs, draft=replace(inputs.draft, lengths=inputs.draft.lengths.clamp(max=1)))
    assert_same(verify("block", short), verify("token", short))


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_greedy_rows_follow_the_argmax_and_the_first_of_equals(rule: str) -> None:
    logits = torch.zeros(3, 3, 4)
    logits[:, 0, 2] = logits[:, 1, 1] = logits[:, 2, 3] = 1.0
    logits[:, 1, 2] = 1.0  # a tie, as bfloat16 logits have them: the first wins
    draft = Draft(torch.tensor([[2, 1], [2, 2], [0, 1]]), torch.tensor([2, 2, 2]))
    u = torch.full((3, 2), ALMOST_ONE, dtype=torch.float64)
    verdict = verify(rule, VerifyInput(logits * 5, draft, torch.zeros(3), u, u[:, 0]))
    assert verdict.accepted.tolist() == [2, 1, 0]
    assert verdict.tokens.tolist() == [[2, 1, 3], [2, 1, 0], [2, 0, 0]]
    unscaled = (logits * 5).log_softmax(-1)
    assert verdict.logprobs[1].tolist() == pytest.approx([unscaled[1, 0, 2].item(), unscaled[1, 1, 1].item(), 0.0])


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_logprobs_are_the_targets_at_the_sampling_temperature(rule: str) -> None:
    inputs = replace(case(200, 3, 11, seed=15), temperature=torch.full((200,), 0.6))
    verdict = verify(rule, inputs)
    rows = (inputs.target_logits / 0.6).log_softmax(-1).gather(2, verdict.tokens[..., None])[..., 0]
    emitted = torch.arange(4) <= verdict.accepted[:, None]
    torch.testing.assert_close(verdict.logprobs, rows.where(emitted, 0.0), atol=1e-5, rtol=1e-5)
    assert bool((verdict.tokens[~emitted] == 0).all())


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_token_the_target_forbids_is_rejected_by_any_uniform(rule: str) -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = -torch.inf
    draft = Draft(torch.tensor([[1, 0]]), torch.tensor([2]), torch.full((1, 2, 4), 0.25).log())
    u = torch.full((1, 2), 2.0**-53, dtype=torch.float64)
    verdict = verify(rule, VerifyInput(logits, draft, torch.ones(1), u, u[:, 0]))
    assert verdict.accepted.item() == 0 and verdict.tokens[0, 0].item() != 1


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_residual_that_rounds_to_nothing_falls_back_to_the_target(rule: str) -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    log_q = (p.log() + 3e-7).expand(1, 2, 4)  # above p everywhere by rounding, so nothing is left of p - q
    draft = Draft(torch.tensor([[0, 2]]), torch.tensor([2]), log_q)
    accept = torch.full((1, 2), ALMOST_ONE, dtype=torch.float64)
    for u, token in ((0.1, 0), (0.6, 2), (ALMOST_ONE, 3)):
        residual = torch.tensor([u], dtype=torch.float64)
        verdict = verify(rule, VerifyInput(p.log().expand(1, 3, 4), draft, torch.ones(1), accept, residual))
        assert verdict.accepted.item() == 0 and verdict.tokens[0, 0].item() == token


def test_mistakes_raise_one_sentence() -> None:
    inputs = case(8, 2, 11, seed=16)
    draft = replace(inputs.draft, lengths=torch.full((8,), 2))
    inputs = replace(inputs, draft=draft, temperature=torch.ones(8))
    logits = inputs.target_logits
    assert draft.log_q is not None

    def refused(match: str, **changes: Tensor | Draft) -> None:
        with pytest.raises(ValueError, match=match):
            verify("block", replace(inputs, **changes))

    refused(
        r"target_logits has shape \(8, 2, 11\), but the draft's tokens ask for \(8, 3, 11\)",
        target_logits=logits[:, :2],
    )
    refused("accept_uniforms has shape", accept_uniforms=inputs.accept_uniforms[:, :1])
    refused("residual_uniforms has shape", residual_uniforms=inputs.residual_uniforms[:1])
    refused("log_q has shape", draft=replace(draft, log_q=draft.log_q[:, :, :5]))
    refused("tree", draft=replace(draft, parents=draft.tokens))
    refused("draft length is not in 0..2", draft=replace(draft, lengths=draft.lengths + 1))
    refused("sequence 0 .* vocabulary 0..10", draft=replace(draft, tokens=draft.tokens + 11))
    refused("temperature", temperature=-inputs.temperature)
    broken = logits.clone()
    broken[3, 1, 5] = torch.nan
    refused("sequence 3 .* NaN", target_logits=broken)
    refused("row of only -inf", target_logits=torch.full_like(logits, -torch.inf))
    refused("probability zero", draft=replace(draft, log_q=torch.full_like(draft.log_q, -torch.inf)))
    outside = Draft(torch.full_like(draft.tokens, 3), draft.lengths, draft.log_q[:, :, :2], torch.tensor([2, 4]))
    refused("probability zero", draft=outside)
    with pytest.raises(ValueError, match="no verification rule 'typical'; the rules are token, block"):
        verify("typical", inputs)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_can_replace_any_rule(name: str) -> None:
    for k, one_hot in ((0, True), (1, False), (3, False), (3, True)):
        inputs = case(40, k, 30, seed=18, one_hot=one_hot)
        rows = torch.arange(k + 1) > inputs.draft.lengths[:, None]
        logits = inputs.target_logits.masked_fill(rows[..., None], torch.nan)
        verdict = BROKEN[name](replace(inputs, target_logits=logits))
        assert verdict.tokens.shape == (40, k + 1) and bool((verdict.accepted <= inputs.draft.lengths).all())
        assert bool(verdict.logprobs.isfinite().all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_cuda_and_cpu_agree(rule: str) -> None:
    for vocabulary in (None, torch.arange(0, 600, 7)):
        inputs = case(200, 3, 600, seed=17, vocabulary=vocabulary)
        verdict = verify(rule, on_device(inputs, "cuda"))
        back = VerifyResult(verdict.accepted.cpu(), verdict.tokens.cpu(), verdict.logprobs.cpu())
        assert_same(back, verify(rule, inputs))


# --- distributions, by sampling ---------------------------------------------------------------------------------------
# One round and its completion by the target give k+1 tokens; their joint counts are tested against the exact law. With
# N = 700,000 rounds a law that is 1 % away in total variation lies 5 standard deviations above the critical value.

SIZE, K, ROUNDS = 4, 2, 700_000
TARGET, DRAFTER = random_model(7, SIZE), random_model(107, SIZE)
Lengths = Callable[[Tensor], Tensor]


def table(model: Model, depth: int) -> Tensor:
    """The model's rows after every text of `depth` tokens: [SIZE**depth, SIZE]."""
    rows = [[float(value) for value in model(text)] for text in product(range(SIZE), repeat=depth)]
    return torch.tensor(rows, dtype=torch.float64)


def index(texts: Tensor) -> Tensor:
    """Number of every text [N, n] in base SIZE: [N]."""
    place = SIZE ** torch.arange(texts.shape[1] - 1, -1, -1)
    return (texts * place).sum(1)


def draws(purpose: Purpose, columns: int) -> Tensor:
    seeds = torch.arange(ROUNDS) + 10_000_000
    return uniforms(seeds, torch.arange(columns).expand(ROUNDS, -1), purpose)


def drafted_rounds(one_hot: bool) -> tuple[Tensor, Tensor]:
    """Draft tokens [N, K] and the rows they came from [N, K, SIZE]."""
    u, tokens, rows = draws(Purpose.DRAFT, K), torch.zeros(ROUNDS, 0, dtype=torch.int64), []
    for slot in range(K):
        rows.append(table(DRAFTER, slot)[index(tokens)])
        drawn = rows[-1].argmax(1) if one_hot else inverse_cdf(rows[-1], u[:, slot])
        tokens = torch.cat([tokens, drawn[:, None]], 1)
    return tokens, torch.stack(rows, 1)


def counts(rule: RuleFunction, one_hot: bool, lengths: Lengths) -> Tensor:
    """How often every text of K+1 tokens came out: [SIZE**(K+1)]."""
    tokens, q = drafted_rounds(one_hot)
    logits = torch.stack([table(TARGET, slot)[index(tokens[:, :slot])].log() for slot in range(K + 1)], 1)
    draft = Draft(tokens, lengths(tokens), None if one_hot else q.log().float())
    accept, residual = draws(Purpose.ACCEPT, K), draws(Purpose.RESIDUAL, 1)[:, 0]
    verdict = rule(VerifyInput(logits.float(), draft, torch.ones(ROUNDS), accept, residual))
    texts, u = verdict.tokens.clone(), draws(Purpose.PLAIN, K + 1)
    for slot in range(1, K + 1):
        plain = inverse_cdf(table(TARGET, slot)[index(texts[:, :slot])], u[:, slot])
        texts[:, slot] = torch.where(slot <= verdict.accepted, texts[:, slot], plain)
    return index(texts).bincount(minlength=SIZE ** (K + 1))


def law() -> Tensor:
    exact = target_law(TARGET, K + 1)
    return torch.tensor([float(exact[text]) for text in product(range(SIZE), repeat=K + 1)], dtype=torch.float64)


def whole(tokens: Tensor) -> Tensor:
    return torch.full((len(tokens),), K)


def stopping(tokens: Tensor) -> Tensor:
    return torch.where(tokens[:, 0] % 2 == 0, K, 1)


def test_the_power_of_the_sampled_test() -> None:
    assert sigmas_of_detection(ROUNDS, SIZE ** (K + 1), 4 * 0.01**2) > 5


@pytest.mark.parametrize("lengths", [whole, stopping])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_sampled_rounds_follow_the_target(rule: str, one_hot: bool, lengths: Lengths) -> None:
    assert p_value(counts(CHAIN_RULES[rule], one_hot, lengths), law()) > LEVEL


@pytest.mark.parametrize("name", BROKEN)
def test_the_sampled_test_catches_every_broken_rule(name: str) -> None:
    assert p_value(counts(BROKEN[name], False, whole), law()) < LEVEL


def test_the_sampled_test_catches_a_length_that_peeks() -> None:
    def peeking(tokens: Tensor) -> Tensor:
        return torch.where(tokens[:, 0] == 0, 0, K)

    assert p_value(counts(CHAIN_RULES["token"], False, peeking), law()) < LEVEL
    assert p_value(counts(CHAIN_RULES["block"], False, peeking), law()) < LEVEL


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_a_wide_vocabulary_follows_the_target(rule: str) -> None:
    """First two tokens of a round over V = 64 with D = 40: 4096 cells pooled to 8 x 8, and the 64 first tokens."""
    rounds, size, vocabulary = 200_000, 64, torch.arange(0, 64)[torch.arange(64) % 8 < 5]
    first, second = randn(size, seed=1) * 1.5, randn(size, size, seed=2) * 1.5
    q = (first[vocabulary] + randn(40, seed=3) * 0.6).log_softmax(0).expand(rounds, -1)
    one = inverse_cdf_log(q, rand(rounds, seed=4))
    q_next = (second[vocabulary[one]][:, vocabulary] * 0.8).log_softmax(1)
    two = inverse_cdf_log(q_next, rand(rounds, seed=5))
    tokens = vocabulary[torch.stack([one, two], 1)]
    logits = torch.stack([first.expand(rounds, -1), second[tokens[:, 0]], torch.zeros(rounds, size)], 1)
    draft = Draft(tokens, torch.full((rounds,), 2), torch.stack([q, q_next], 1), vocabulary)
    accept, residual = rand(rounds, 2, seed=6), rand(rounds, seed=7)
    verdict = verify(rule, VerifyInput(logits, draft, torch.ones(rounds), accept, residual))
    plain = inverse_cdf_log(second[verdict.tokens[:, 0]], rand(rounds, seed=8))
    texts = torch.stack([verdict.tokens[:, 0], torch.where(verdict.accepted > 0, verdict.tokens[:, 1], plain)], 1)
    joint = first.double().softmax(0)[:, None] * second.double().softmax(1)
    seen = (texts[:, 0] * size + texts[:, 1]).bincount(minlength=size**2).view(size, size)
    assert p_value(seen.sum(1), joint.sum(1)) > LEVEL

    def coarse(cells: Tensor) -> Tensor:
        return cells.view(8, 8, 8, 8).sum((1, 3)).flatten()

    assert p_value(coarse(seen), coarse(joint)) > LEVEL
    assert p_value(seen.flatten(), joint.flatten()) > LEVEL
