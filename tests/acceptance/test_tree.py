"""The tree rules against their reference and in their corner cases."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forerun.acceptance.chain import verify
from forerun.acceptance.tree import TREE_RULES, TreeResult, verify_tree
from forerun.types import Draft, VerifyInput
from proofs.broken_tree import BROKEN_TREE
from proofs.tree_oracle import verify_tree_reference
from verify_inputs import ALMOST_ONE, DRAWN, drawn_columns, on_device, rand, randn, rows_of


def case(
    batch: int,
    k: int,
    size: int,
    seed: int,
    drawn: str = "sampled",
    with_q: bool = True,
    vocabulary: Tensor | None = None,
) -> VerifyInput:
    """Random input of a rule: random ragged trees, mixed temperatures, a draft that resembles the target."""
    logits = randn(batch, k + 1, size, seed=seed) * 2
    wide = logits + randn(batch, k + 1, size, seed=seed + 1) * 0.7
    q = (wide if vocabulary is None else wide[:, :, vocabulary]).log_softmax(-1)  # by row
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.6])[torch.arange(batch) % 4]
    parents = ((rand(batch, k, seed=seed + 2) ** 0.6 * (torch.arange(k) + 1)).long() - 1).clamp(min=-1)
    columns = drawn_columns(q, parents, drawn, rand(batch, k, seed=seed + 3))
    if vocabulary is None:
        columns = follow_argmax(columns, parents, logits, (temperature == 0)[:, None] & (rand(batch, k, seed=9) < 0.7))
    tokens = columns if vocabulary is None else vocabulary[columns]
    lengths = (rand(batch, seed=seed + 4) * (k + 1)).long().where(torch.arange(batch) % 3 > 0, k)
    log_q = q.gather(1, (parents + 1)[..., None].expand(-1, -1, q.shape[2]))
    draft = Draft(tokens, lengths, log_q if with_q else None, vocabulary if with_q else None, parents)
    return VerifyInput(logits, draft, temperature, rand(batch, k, seed=seed + 5), rand(batch, seed=seed + 6))


def follow_argmax(tokens: Tensor, parents: Tensor, logits: Tensor, here: Tensor) -> Tensor:
    """Give nodes the target's argmax where `here` says so and no sibling has it."""
    tokens = tokens.clone()
    for slot in range(tokens.shape[1]):
        best = logits[torch.arange(len(tokens)), parents[:, slot] + 1].argmax(1)
        taken = ((tokens == best[:, None]) & (parents == parents[:, slot, None])).any(1)
        tokens[:, slot] = torch.where(here[:, slot] & ~taken, best, tokens[:, slot])
    return tokens


def assert_same(one: TreeResult, other: TreeResult) -> None:
    assert torch.equal(one.accepted, other.accepted)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.path, other.path)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3, 6, 12])
@pytest.mark.parametrize("rule", TREE_RULES)
def test_a_rule_equals_its_reference(rule: str, k: int, with_q: bool) -> None:
    inputs = case(240, k, 15, seed=100 * k, drawn=DRAWN[rule], with_q=with_q)
    result = verify_tree(rule, inputs)
    assert_same(result, verify_tree_reference(rule, inputs))
    assert result.tokens.dtype == torch.int64 and result.logprobs.dtype == torch.float32
    assert result.path.shape[1] == result.tokens.shape[1] - 1
    if k > 3:
        assert {0, 1, 2} <= set(result.accepted.tolist())


@pytest.mark.parametrize("rule", TREE_RULES)
def test_a_smaller_draft_vocabulary_equals_its_reference(rule: str) -> None:
    inputs = case(160, 5, 300, seed=7, drawn=DRAWN[rule], vocabulary=torch.arange(0, 300, 7))
    assert_same(verify_tree(rule, inputs), verify_tree_reference(rule, inputs))


@pytest.mark.parametrize("rule", TREE_RULES)
def test_masked_logits_equal_the_reference_and_are_never_emitted(rule: str) -> None:
    inputs = case(240, 6, 15, seed=9, drawn=DRAWN[rule])
    masked = rand(*inputs.target_logits.shape, seed=10) < 0.4
    masked[:, :, 4] = False
    inputs = replace(inputs, target_logits=inputs.target_logits.masked_fill(masked, -torch.inf))
    result = verify_tree(rule, inputs)
    assert_same(result, verify_tree_reference(rule, inputs))
    assert bool(result.logprobs.isfinite().all())


@pytest.mark.parametrize("rule", TREE_RULES)
def test_bfloat16_and_strided_logits_equal_the_reference(rule: str) -> None:
    inputs = case(60, 5, 300, seed=11, drawn=DRAWN[rule])
    rough = replace(inputs, target_logits=inputs.target_logits.bfloat16())
    assert_same(verify_tree(rule, rough), verify_tree_reference(rule, rough))
    strided = torch.empty(60, 300, 6).transpose(1, 2).copy_(inputs.target_logits)
    assert not strided.is_contiguous()
    assert_same(verify_tree(rule, replace(inputs, target_logits=strided)), verify_tree(rule, inputs))


@pytest.mark.parametrize("rule", TREE_RULES)
def test_a_verdict_does_not_depend_on_the_batch(rule: str) -> None:
    inputs = case(60, 6, 200, seed=12, drawn=DRAWN[rule])
    whole = verify_tree(rule, inputs)
    for part in (torch.arange(59, -1, -1), torch.tensor([17]), torch.arange(20, 43)):
        result = verify_tree(rule, rows_of(inputs, part))
        width = result.path.shape[1]  # the depth of the deepest tree in the batch
        assert torch.equal(result.accepted, whole.accepted[part])
        assert torch.equal(result.path, whole.path[part, :width])
        assert torch.equal(result.tokens, whole.tokens[part, : width + 1])
        logprobs = whole.logprobs[part, : width + 1]
        torch.testing.assert_close(result.logprobs, logprobs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_what_lies_beyond_the_length_is_not_read(rule: str) -> None:
    inputs = case(120, 6, 15, seed=13, drawn=DRAWN[rule])
    draft = inputs.draft
    assert draft.log_q is not None and draft.parents is not None
    beyond = torch.arange(6) >= draft.lengths[:, None]
    rows = torch.arange(7) > draft.lengths[:, None]
    spoiled = replace(
        draft,
        tokens=draft.tokens.masked_fill(beyond, -1),
        parents=draft.parents.masked_fill(beyond, 99),
        log_q=draft.log_q.masked_fill(beyond[..., None], torch.nan),
    )
    other = replace(inputs, target_logits=inputs.target_logits.masked_fill(rows[..., None], torch.nan), draft=spoiled)
    if rule != "walk":  # whose uniforms go by depth
        other = replace(other, accept_uniforms=inputs.accept_uniforms.masked_fill(beyond, torch.nan))
    assert_same(verify_tree(rule, other), verify_tree(rule, inputs))


@pytest.mark.parametrize("rule", ["walk", "rrs", "best_sampled"])
def test_only_the_rows_on_the_path_are_read(rule: str) -> None:
    """Whatever the other rows hold; traversal reads those of all nodes with children."""
    inputs = case(120, 6, 15, seed=19, drawn=DRAWN[rule])
    before = verify_tree(rule, inputs)
    off = torch.ones(120, 8, dtype=torch.bool).scatter(1, before.path + 1, False)[:, :7]
    off[:, 0] = False
    logits = inputs.target_logits.masked_fill(off[..., None], torch.nan)
    assert_same(verify_tree(rule, replace(inputs, target_logits=logits)), before)


def test_siblings_share_the_row_of_the_first() -> None:
    inputs = case(120, 6, 15, seed=20)
    draft = inputs.draft
    assert draft.log_q is not None and draft.parents is not None
    related = draft.parents[:, :, None] == draft.parents[:, None, :]
    younger = (related & torch.ones(6, 6, dtype=torch.bool).tril(-1)).any(2)
    log_q = draft.log_q.clone()
    log_q[younger] = log_q[younger].roll(1, 1).clamp(min=-30)
    other = replace(inputs, draft=replace(draft, log_q=log_q))
    for rule in ("rrs", "traversal"):
        assert_same(verify_tree(rule, inputs), verify_tree(rule, other))


def test_a_chain_is_verified_as_by_the_chain_rules() -> None:
    """Uniform for uniform: traversal as block verification, the others as the token rule."""
    for with_q in (True, False):
        inputs = case(400, 4, 15, seed=14, with_q=with_q)
        chain = replace(inputs, draft=replace(inputs.draft, parents=None))
        as_tree = replace(inputs, draft=replace(inputs.draft, parents=(torch.arange(4) - 1).expand(400, -1)))
        for tree_rule, chain_rule in (("traversal", "block"), ("rrs", "token"), ("walk", "token")):
            if with_q and tree_rule == "walk":
                continue
            one, other = verify_tree(tree_rule, as_tree), verify(chain_rule, chain)
            assert torch.equal(one.accepted, other.accepted)
            assert torch.equal(one.tokens, other.tokens)
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=1e-5)
            on_path = torch.arange(4) < other.accepted[:, None]
            assert torch.equal(one.path, torch.where(on_path, torch.arange(4), -1))


@pytest.mark.parametrize("rule", TREE_RULES)
def test_without_q_every_rule_is_the_walk(rule: str) -> None:
    inputs = case(200, 6, 15, seed=21, with_q=False)
    assert_same(verify_tree(rule, inputs), verify_tree("walk", inputs))


@pytest.mark.parametrize("rule", TREE_RULES)
def test_greedy_rows_follow_the_argmax_and_the_first_of_equals(rule: str) -> None:
    logits = torch.zeros(3, 5, 4)
    logits[:, 0, 2] = logits[:, 2, 1] = logits[:, 4, 3] = 1.0
    logits[1, 2, 2] = 1.0  # a tie, as bfloat16 logits have them: the first wins
    #      root -> 1, 2; 2 -> 1 (or 2); that -> 0
    tokens = torch.tensor([[1, 2, 0, 1], [1, 2, 0, 2], [1, 0, 0, 1]])
    draft = Draft(tokens, torch.tensor([4, 4, 4]), parents=torch.tensor([[-1, -1, 0, 1]] * 3))
    u = torch.full((3, 4), ALMOST_ONE, dtype=torch.float64)
    result = verify_tree(rule, VerifyInput(logits * 5, draft, torch.zeros(3), u, u[:, 0]))
    assert result.accepted.tolist() == [2, 1, 0]
    assert result.tokens.tolist() == [[2, 1, 3], [2, 1, 0], [2, 0, 0]]
    assert result.path.tolist() == [[1, 3], [1, -1], [-1, -1]]
    unscaled = (logits * 5).log_softmax(-1)
    assert result.logprobs[1].tolist() == pytest.approx([unscaled[1, 0, 2].item(), unscaled[1, 2, 1].item(), 0])


@pytest.mark.parametrize("rule", TREE_RULES)
def test_logprobs_are_the_targets_at_the_sampling_temperature(rule: str) -> None:
    inputs = replace(case(200, 6, 15, seed=15, drawn=DRAWN[rule]), temperature=torch.full((200,), 0.6))
    result = verify_tree(rule, inputs)
    rows = torch.nn.functional.pad((result.path + 1).clamp(min=0), (1, 0))
    table = (inputs.target_logits / 0.6).log_softmax(-1)
    expected = table[torch.arange(200)[:, None], rows, result.tokens]
    emitted = torch.arange(rows.shape[1]) <= result.accepted[:, None]
    torch.testing.assert_close(result.logprobs, expected.where(emitted, 0.0), atol=1e-5, rtol=1e-5)
    assert bool((result.tokens[~emitted] == 0).all())


@pytest.mark.parametrize("rule", TREE_RULES)
def test_a_token_the_target_forbids_is_rejected_by_any_uniform_with_all_below_it(rule: str) -> None:
    logits = torch.zeros(1, 4, 4)
    logits[0, 0, 1] = -torch.inf
    uniform = torch.full((1, 3, 4), 0.25).log()
    draft = Draft(torch.tensor([[1, 0, 2]]), torch.tensor([3]), uniform, parents=torch.tensor([[-1, 0, 1]]))
    u = torch.full((1, 3), 2.0**-53, dtype=torch.float64)
    result = verify_tree(rule, VerifyInput(logits, draft, torch.ones(1), u, u[:, 0]))
    assert result.accepted.item() == 0 and result.tokens[0, 0].item() != 1


@pytest.mark.parametrize("rule", ["rrs", "traversal"])
def test_a_residual_that_rounds_to_nothing_falls_back_to_what_the_target_allows(rule: str) -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    log_p = torch.where(p > 0, p.log(), -torch.inf)
    near = (p * torch.tensor([1 + 3e-7, 1, 1 - 3e-7, 1 - 3e-7])).log()
    draft = Draft(torch.tensor([[0]]), torch.tensor([1]), near.expand(1, 1, 4), parents=torch.tensor([[-1]]))
    accept = torch.full((1, 1), ALMOST_ONE, dtype=torch.float64)
    for u in (0.1, 0.6, ALMOST_ONE):
        residual = torch.tensor([u], dtype=torch.float64)
        inputs = VerifyInput(log_p.expand(1, 2, 4), draft, torch.ones(1), accept, residual)
        assert verify_tree(rule, inputs).tokens[0, 0].item() != 1


@pytest.mark.parametrize("rule", ["rrs", "best_sampled", "traversal"])
def test_siblings_after_a_certain_one_keep_their_q(rule: str) -> None:
    """q gives the first all but e^-200: one minus its share is 0, yet the later ones were drawn 3 : 1."""
    log_q = torch.tensor([0.0, -200.0, -200.0, -200.0 - 1.0986123]).expand(1, 2, 4)
    logits = torch.tensor([-9.0, 0.0, 0.0, 0.0]).expand(1, 3, 4)
    draft = Draft(torch.tensor([[0, 3]]), torch.tensor([2]), log_q, parents=torch.tensor([[-1, -1]]))
    for u in (0.9, ALMOST_ONE):
        uniforms = torch.tensor([[0.5, u]], dtype=torch.float64)
        inputs = VerifyInput(logits, draft, torch.ones(1), uniforms, uniforms[:, 0])
        assert_same(verify_tree(rule, inputs), verify_tree_reference(rule, inputs))
        assert verify_tree(rule, inputs).path.tolist() == [[1]]  # p = 1/3 is more than q = 1/7


@pytest.mark.parametrize("rule", ["rrs", "traversal"])
def test_a_draft_equal_to_the_target_is_accepted_along_the_first_children(rule: str) -> None:
    inputs = case(200, 6, 15, seed=22)
    logits, draft = inputs.target_logits, inputs.draft
    assert draft.parents is not None
    log_q = logits.log_softmax(-1).gather(1, (draft.parents + 1)[..., None].expand(-1, -1, 15))
    node, depth, at = torch.zeros(200, dtype=torch.int64), torch.zeros(200, dtype=torch.int64), torch.arange(200)
    for slot in range(6):  # slots ascend, so one pass follows the first children down
        down = (draft.parents[:, slot] + 1 == node) & (slot < draft.lengths)
        first = down & (draft.parents[:, :slot] != draft.parents[:, slot, None]).all(1)
        node[at[first]], depth = slot + 1, depth + first
    u = torch.full((200, 6), 1 - 1e-5, dtype=torch.float64)
    draft = replace(draft, log_q=log_q)
    result = verify_tree(rule, replace(inputs, draft=draft, temperature=torch.ones(200), accept_uniforms=u))
    assert torch.equal(result.accepted, depth)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_a_node_whose_children_hold_every_token_is_always_left(rule: str) -> None:
    logits, log_q = randn(50, 4, 3, seed=23), randn(50, 1, 3, seed=24).log_softmax(-1)
    tokens = torch.tensor([[2, 0, 1]]).expand(50, -1)
    parents = torch.full((50, 3), -1)
    draft = Draft(tokens, torch.full((50,), 3), log_q.expand(-1, 3, -1), parents=parents)
    u = torch.full((50, 3), 1 - 1e-5, dtype=torch.float64)
    result = verify_tree(rule, VerifyInput(logits, draft, torch.ones(50), u, u[:, 0]))
    assert bool((result.accepted == 1).all())


def test_mistakes_raise_one_sentence() -> None:
    inputs = case(8, 3, 11, seed=16)
    draft = replace(inputs.draft, lengths=torch.full((8,), 3), parents=torch.tensor([[-1, -1, 0]] * 8))
    draft = replace(draft, tokens=torch.tensor([[1, 2, 3]] * 8))
    inputs = replace(inputs, draft=draft, temperature=torch.ones(8))
    logits = inputs.target_logits
    assert draft.log_q is not None and draft.parents is not None

    def refused(match: str, **changes: Tensor | Draft) -> None:
        with pytest.raises(ValueError, match=match):
            verify_tree("traversal", replace(inputs, **changes))

    refused(r"target_logits has shape \(8, 3, 11\), but .* \(8, 4, 11\)", target_logits=logits[:, :3])
    refused("accept_uniforms has shape", accept_uniforms=inputs.accept_uniforms[:, :1])
    refused("log_q has shape", draft=replace(draft, log_q=draft.log_q[:, :, :5]))
    refused("needs draft.parents", draft=replace(draft, parents=None))
    refused(r"parents has shape \(8, 2\), .* \(8, 3\)", draft=replace(draft, parents=draft.parents[:, :2]))
    for wrong in ([-1, 1, 0], [-1, -2, 0], [-1, 0, 5]):
        refused("sequence 0 .* parent of slot j", draft=replace(draft, parents=torch.tensor([wrong] * 8)))
    twins = draft.tokens.clone()
    twins[5, 1] = 1
    refused("sequence 5 .* two siblings hold the same token", draft=replace(draft, tokens=twins))
    refused("draft length is not in 0..3", draft=replace(draft, lengths=draft.lengths + 1))
    refused("sequence 0 .* vocabulary 0..10", draft=replace(draft, tokens=draft.tokens + 11))
    refused("temperature", temperature=-inputs.temperature)
    broken = logits.clone()
    broken[3, 0, 5] = torch.nan
    refused("sequence 3 .* NaN", target_logits=broken)
    refused("row of only -inf", target_logits=torch.full_like(logits, -torch.inf))
    never = draft.log_q.clone()
    never[:, :, 2] = -torch.inf
    refused("probability zero", draft=replace(draft, log_q=never))
    with pytest.raises(ValueError, match="no tree rule 'block'; the rules are walk, rrs, best_sampled, traversal"):
        verify_tree("block", inputs)
    assert verify_tree("walk", replace(inputs, draft=replace(draft, log_q=never))).path.shape == (8, 2)


@pytest.mark.parametrize("name", BROKEN_TREE)
def test_a_broken_rule_can_replace_any_tree_rule(name: str) -> None:
    for k, with_q in ((0, False), (1, True), (6, True), (6, False)):
        inputs = case(40, k, 30, seed=18, with_q=with_q)
        rows = torch.arange(k + 1) > inputs.draft.lengths[:, None]
        logits = inputs.target_logits.masked_fill(rows[..., None], torch.nan)
        result = BROKEN_TREE[name].rule(replace(inputs, target_logits=logits))
        assert bool((result.accepted <= inputs.draft.lengths).all())
        assert bool(result.logprobs.isfinite().all())


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation makes, views of `inputs` aside."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.elements, self.known = 0, {one.untyped_storage().data_ptr() for one in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("rule", TREE_RULES)
def test_nothing_of_the_size_of_the_logits_is_built(rule: str) -> None:
    inputs = case(16, 12, 40_000, seed=26, drawn=DRAWN[rule])
    assert inputs.draft.log_q is not None
    with LargestResult(inputs.target_logits, inputs.draft.log_q) as largest:
        verify_tree(rule, inputs)
    assert 0 < largest.elements <= 1 << 21 < inputs.target_logits.numel() / 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", TREE_RULES)
def test_cuda_and_cpu_agree(rule: str) -> None:
    for vocabulary in (None, torch.arange(0, 600, 7)):
        inputs = case(200, 8, 600, seed=17, drawn=DRAWN[rule], vocabulary=vocabulary)
        result = verify_tree(rule, on_device(inputs, "cuda"))
        back = TreeResult(*(getattr(result, field.name).cpu() for field in fields(TreeResult)))
        assert_same(back, verify_tree(rule, inputs))
