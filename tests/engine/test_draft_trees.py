"""Draft trees in the local engine: a pass against a forward per path, and a drafter that hides the truth in trees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forerun.drafters.base import Drafter, Rows, emitted
from forerun.engine.base import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import request_seed
from forerun.engine.local.tree import along_path, depths, keep_path, lineage, tree_places
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.models.auxiliary import AuxiliaryStates
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import PolicyForward, check_trees
from forerun.types import Draft, VerifyResult

TEXTS = [[5, 6, 7, 8], [9, 4], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [30] * 20]
FAMILIES = [("llama", True), ("llama", False), ("qwen3", True), ("qwen2", False), ("gemma2", True), ("gemma3", True)]
TAPS = (0, 2)


def random_draft(batch: int, k: int, vocabulary: int, seed: int) -> Draft:
    """Random ragged trees; all tokens of a row differ."""
    generator = torch.Generator().manual_seed(seed)
    parents = (torch.rand(batch, k, generator=generator) * (torch.arange(k) + 1)).long() - 1
    tokens = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(batch)])
    lengths = torch.randint(1, k + 1, (batch,), generator=generator)
    lengths[0] = k
    return Draft(tokens, lengths, parents=parents)


def assert_equal(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    """Within `bound` of the largest number there is, in float32; of 1 where all are smaller."""
    torch.testing.assert_close(ours, theirs, atol=bound * max(1.0, float(theirs.abs().max())), rtol=0)


def path_of(draft: Draft, row: int, slot: int) -> list[int]:
    """Slots from below the root down to `slot`, by following parents one at a time."""
    assert draft.parents is not None
    return [] if slot < 0 else [*path_of(draft, row, int(draft.parents[row, slot])), slot]


def prefilled(forward: PolicyForward, k: int) -> tuple[SlotCache, Tensor]:
    """All but the last token of `TEXTS` in a cache, and how many those are."""
    cache, starts = SlotCache(len(TEXTS) + 1, 64), torch.tensor([len(t) - 1 for t in TEXTS])
    width = int(starts.max())
    tokens = torch.tensor([t[:-1] + [0] * (width - len(t) + 1) for t in TEXTS])
    forward(tokens, SlotPass(cache, 0, torch.zeros_like(starts), width, width, fresh=True), head=False)
    return cache, starts


def run_tree(forward: PolicyForward, draft: Draft) -> tuple[SlotCache, Tensor, Tensor, Tensor]:
    k = draft.tokens.shape[1]
    cache, starts = prefilled(forward, k)
    tokens = torch.cat([torch.tensor([[t[-1]] for t in TEXTS]), draft.tokens], 1)
    places = tree_places(draft, starts)
    logits, features = forward(tokens, SlotPass(cache, 0, starts, k + 1, int(starts.max()) + k + 1, tree=places))
    assert logits is not None and features is not None
    return cache, starts, logits, features


def slow_rows(policy: Policy, draft: Draft, row: int, slot: int) -> tuple[Tensor, Tensor]:
    """Logits and tapped features after text and path, by one forward of the whole text, no cache."""
    ids = torch.tensor([TEXTS[row] + [int(draft.tokens[row, s]) for s in path_of(draft, row, slot)]])
    with torch.no_grad(), AuxiliaryStates(policy.model, TAPS) as aux_layers:
        logits = policy.model(ids, use_cache=False).logits[0, -1]
    features = aux_layers.features()
    assert features is not None
    return logits, features[0, -1]


@pytest.mark.parametrize(("family", "fused"), FAMILIES)
def test_one_pass_equals_one_forward_per_path(tiny: Callable[..., Path], family: str, fused: bool) -> None:
    """Ragged texts, ragged trees, windows of 8 positions (gemma): each node sees text, root and ancestors alone."""
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    draft = random_draft(len(TEXTS), 9, 50, seed=3)
    _, _, logits, features = run_tree(PolicyForward(policy, TAPS, fused), draft)
    for row in range(len(TEXTS)):
        for slot in range(-1, int(draft.lengths[row])):
            expected, seen = slow_rows(policy, draft, row, slot)
            ours = logits[row, slot + 1].log_softmax(-1)
            assert_equal(ours, expected.log_softmax(-1))
            assert_equal(features[row, slot + 1], seen)


def test_a_chain_mask_would_be_noticed(policy: Policy) -> None:
    """The control of the test above: cousins that see one another move log-probabilities a thousandfold its bound."""
    draft = random_draft(len(TEXTS), 9, 50, seed=3)
    forward = PolicyForward(policy, TAPS)
    _, _, logits, _ = run_tree(forward, draft)
    cache, starts = prefilled(forward, 9)
    tokens = torch.cat([torch.tensor([[t[-1]] for t in TEXTS]), draft.tokens], 1)
    chained, _ = forward(tokens, SlotPass(cache, 0, starts, 10, int(starts.max()) + 10))
    assert chained is not None
    assert (chained.log_softmax(-1) - logits.log_softmax(-1)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_moved_keys_and_values_are_those_of_plain_decoding(tiny: Callable[..., Path], family: str) -> None:
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    forward, draft = PolicyForward(policy, TAPS), random_draft(len(TEXTS), 9, 50, seed=4)
    cache, starts, _, features = run_tree(forward, draft)
    deepest = [max((path_of(draft, b, s) for s in range(int(draft.lengths[b]))), key=len) for b in range(len(TEXTS))]
    assert any(p != list(range(len(p))) for p in deepest), "no node would have to move"
    width = max(map(len, deepest))
    path = torch.tensor([p + [-1] * (width - len(p)) for p in deepest])
    before = {layer: keys.clone() for layer, keys in cache.keys.items()}
    keep_path(cache, starts, path)
    kept = along_path(features, path)
    for row, slots in enumerate(deepest):
        text = TEXTS[row] + [int(draft.tokens[row, s]) for s in slots]
        plain = SlotCache(1, 64)
        tapped = forward(
            torch.tensor([text]), SlotPass(plain, 0, torch.zeros(1, dtype=torch.int64), len(text), len(text), True)
        )[1]
        assert tapped is not None
        start = int(starts[row])
        assert_equal(kept[row, : len(slots) + 1], tapped[0, start:])
        for layer in cache.keys:
            for ours, theirs in ((cache.keys, plain.keys), (cache.values, plain.values)):
                end = len(text)
                assert_equal(ours[layer][row, :end], theirs[layer][0, :end])
            assert torch.equal(cache.keys[layer][row, : start + 1], before[layer][row, : start + 1])
    assert all(torch.equal(cache.keys[i][len(TEXTS)], before[i][len(TEXTS)]) for i in cache.keys)


def test_lineage_and_depths_by_hand() -> None:
    """Slots 0 and 1 below the root, 2 below 1, 3 below 2; the second row has two slots, and padding of any content."""
    parents = torch.tensor([[-1, -1, 1, 2], [-1, 0, 77, -5]])
    draft = Draft(torch.ones(2, 4, dtype=torch.int64), torch.tensor([4, 2]), parents=parents)
    assert lineage(draft)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 1, 1, 1],
    ]
    assert depths(draft).tolist() == [3, 2]
    assert tree_places(draft, torch.tensor([10, 20])).positions.tolist() == [[10, 11, 11, 12, 13], [20, 21, 22, 21, 21]]


def test_models_that_mix_branches_are_refused(tiny: Callable[..., Path]) -> None:
    policy = load_policy(str(tiny("qwen2")), "float32", "cpu")
    check_trees(policy)
    policy.model.config.layer_types = ["full_attention", "linear_attention", "full_attention", "chunked_attention"]
    with pytest.raises(UserError, match="has linear_attention; use a drafter that proposes chains"):
        check_trees(policy)


class Hider(Drafter):
    """Hides the known continuation of every request in a tree: decoys before and beside each of its nodes."""

    name, trees, aux_layers = "hider", True, (0, 1, 3)

    def __init__(self, truth: dict[int, list[int]], depth: int) -> None:
        self.truth, self.depth = truth, depth
        self.observed: list[tuple[int, int, list[int], Tensor]] = []  # seed, length, emitted, features

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Per step: a decoy below the true node before, the true token, and a decoy's child."""
        tokens = torch.zeros(rows.count, 3 * self.depth, dtype=torch.int64)
        parents, lengths = torch.full_like(tokens, -1), torch.zeros(rows.count, dtype=torch.int64)
        for b in range(rows.count):
            text, at = self.truth[int(rows.seeds[b])], int(rows.lengths[b]) + 1
            above, depth = -1, min(self.depth, int(budget[b]))
            for step, token in enumerate(text[at : at + depth]):
                slot = 3 * step
                tokens[b, slot : slot + 3] = torch.tensor([(token + 1) % 50, token, token])
                parents[b, slot : slot + 3] = torch.tensor([above, above, slot])
                above, lengths[b] = slot + 1, slot + (3 if step + 1 < depth else 2)
        return Draft(tokens, lengths, parents=parents)

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        assert features is not None
        for b, tokens in enumerate(emitted(verdict)):
            self.observed.append((int(rows.seeds[b]), int(rows.lengths[b]), tokens, features[b, : len(tokens)].clone()))


PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30] * 40, [2] * 120]


def truth_of(policy: Policy, tokens: int) -> dict[int, list[int]]:
    """Greedy texts by request, running on behind the end token."""
    plain = LocalEngine(policy, slots=4).stream(PROMPTS, Sampling(tokens, 0.0, ignore_eos=True))
    return {request_seed(0, r.prompt_index, 0): r.prompt_ids + r.tokens for r in plain}


def test_the_hidden_truth_is_found_and_kept(policy: Policy) -> None:
    """Every round of 4 steps emits 5 tokens, and the drafter is shown the features of the path in text order."""
    drafter = Hider(truth_of(policy, 30), depth=4)
    engine = LocalEngine(policy, drafter, k=12, slots=3)
    rollouts = list(engine.stream(PROMPTS, Sampling(25, 0.0, ignore_eos=True)))
    for r in rollouts:
        text = drafter.truth[request_seed(0, r.prompt_index, 0)]
        assert r.prompt_ids + r.tokens == text[: len(r.prompt_ids) + len(r.tokens)]
        if r.finish_reason == "length":
            assert r.rounds == 5 and r.drafted == ([True] * 4 + [False]) * 5
        else:
            assert r.finish_reason == "context" and len(r.prompt_ids) + len(r.tokens) == policy.context
    metrics = engine.metrics()
    assert metrics["acceptance_per_position"] == [1.0] * 4
    assert 10 < metrics["k_mean"] <= 11 and 4.5 < metrics["acceptance_length"] <= 5
    for seed, length, _, features in drafter.observed:
        ids = torch.tensor([drafter.truth[seed][: length + len(features)]])
        with torch.no_grad(), AuxiliaryStates(policy.model, drafter.aux_layers) as aux_layers:
            policy.model(ids, use_cache=False)
        expected = aux_layers.features()
        assert expected is not None
        assert_equal(features, expected[0, length:], 2e-5)


def test_ends_inside_an_accepted_path(policy: Policy) -> None:
    """End token, stop string and last context position, each inside a path that verification accepted as a whole."""
    truth = truth_of(policy, 60)
    ended = 0
    for stop in ((), ("7", "ab", "x")):
        plain = LocalEngine(policy, slots=4).generate(PROMPTS, max_new_tokens=60, temperature=0.0, stop=stop)
        drafter = Hider(truth, depth=7)
        hidden = LocalEngine(policy, drafter, k=21, slots=2).generate(
            PROMPTS, max_new_tokens=60, temperature=0.0, stop=stop
        )
        assert [(r.tokens, r.finish_reason) for r in hidden] == [(r.tokens, r.finish_reason) for r in plain]
        ended += sum(r.drafted[-1] for r in hidden if r.finish_reason in ("eos", "stop"))
        for r in hidden:  # nothing behind an end reaches the drafter
            seed = request_seed(0, r.prompt_index, 0)
            assert sum(len(tokens) for which, _, tokens, _ in drafter.observed if which == seed) == len(r.tokens)
    assert ended > 0, "no sample ended on a drafted token: the test would be idle"


def test_a_tree_that_is_none_is_told(policy: Policy) -> None:
    class Twins(Hider):
        def propose(self, rows: Rows, budget: Tensor) -> Draft:
            tokens = torch.full((rows.count, 2), 7)
            return Draft(tokens, torch.full_like(rows.last, 2), parents=torch.full_like(tokens, -1))

    with pytest.raises(ValueError, match="two siblings hold the same token"):
        LocalEngine(policy, Twins({}, 1), k=2, slots=2).generate([[5, 6]], max_new_tokens=4)
