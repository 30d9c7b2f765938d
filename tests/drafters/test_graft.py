"""Graft against slow references of its parts, and the drafter at work: greedy identity, the exact law, its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

import drafter_contract as contract
from chi_square import p_value_of_texts
from forerun.config import GraftConfig, SpeculationConfig, load_recipe
from forerun.drafters import load_drafter
from forerun.drafters.base import Rows
from forerun.drafters.eagle3 import Eagle3Head
from forerun.drafters.graft import Adjacency, GraftDrafter, Nodes, as_draft, graft, rank_paths, rank_template
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.models.auxiliary import AuxiliaryStates
from forerun.training.weights import pack_weights
from forerun.types import Draft
from proofs.broken_tree import BROKEN_TREE
from tiny_models import random_drafter, random_head

SMALL, PAPER = GraftConfig(), GraftConfig(preset="paper")
VARIANTS = ("graft", "root", "tail", "prune", "eagle")
Path_ = tuple[int, ...]


def make(policy: Policy, settings: GraftConfig = SMALL, scale: float = 0.15) -> GraftDrafter:
    return GraftDrafter(random_head(policy, scale=scale), policy, settings)


def paths(draft: Draft, row: int) -> list[Path_]:
    """Token paths of a row's nodes, in slot order."""
    assert draft.parents is not None
    found: list[Path_] = []
    for slot in range(int(draft.lengths[row])):
        parent = int(draft.parents[row, slot])
        assert -1 <= parent < slot
        found.append((*(found[parent] if parent >= 0 else ()), int(draft.tokens[row, slot])))
    assert len(set(found)) == len(found)
    return found


# --- the template and the table ---------------------------------------------------------------------------------------


def test_the_papers_template_has_its_shape() -> None:
    """Table 7 gives widths; the rest is what the text says: rank 0 is deepest, early ranks have more descendants."""
    found = rank_paths(PAPER.template, PAPER.successors)
    assert len(found) == sum(PAPER.template) == 52
    assert [sum(len(p) == d for p in found) for d in range(1, 10)] == [8, 10, 8, 6, 5, 4, 4, 4, 3]
    assert (0,) * 9 in found and all(p[:-1] in found[:i] for i, p in enumerate(found) if len(p) > 1)
    below = [sum(p[0] == rank for p in found) for rank in range(8)]
    assert below == sorted(below, reverse=True) and below[0] > 26


def test_the_newest_row_of_a_token_stays() -> None:
    table = Adjacency(6, 2, torch.device("cpu"))
    table.update(torch.tensor([4, 2, 4, 5, 4]), torch.tensor([[1, 2], [3, 4], [5, 0], [0, 1], [2, 3]]))
    assert table.table.tolist() == [[-1, -1], [-1, -1], [3, 4], [-1, -1], [2, 3], [0, 1]]
    table.update(torch.tensor([2]), torch.tensor([[0, 5]]))
    assert table.table[2].tolist() == [0, 5] and table.table[4].tolist() == [2, 3]


def test_retrieval_follows_the_table_path_by_path() -> None:
    generator = torch.Generator().manual_seed(1)
    table = Adjacency(30, 4, torch.device("cpu"))
    known = torch.randperm(30, generator=generator)[:22]
    table.update(known, torch.stack([torch.randperm(30, generator=generator)[:4] for _ in known]))
    roots = torch.arange(30)
    found = table.descend(roots, rank_template((4, 5, 3, 2), 4, torch.device("cpu")))
    missing = 0
    for root in roots.tolist():
        for i, ranks in enumerate(rank_paths((4, 5, 3, 2), 4)):
            token = root
            for rank in ranks:
                token = int(table.table[token, rank]) if token >= 0 else -1
            assert int(found[root, i]) == token
            missing += token < 0
    assert 50 < missing < 300


# --- filling ----------------------------------------------------------------------------------------------------------


def slow_graft(
    kept: list[Path_], at: Path_, template: list[Path_], tokens: list[int], free: int, room: int
) -> list[Path_]:
    """The retrieved paths that are added, one after the other."""
    every, added = set(kept), []
    for i, ranks in enumerate(template):
        chain = [tokens[template.index(ranks[: d + 1])] for d in range(len(ranks))]
        path = (*at, *chain)
        if min(chain) < 0 or path in every or len(path) > room or len(added) >= free:
            continue
        if len(path) > 1 and path[:-1] not in every:
            continue
        every.add(path)
        added.append(path)
        assert tokens[i] == path[-1]
    return added


def random_kept(generator: torch.Generator, batch: int, width: int) -> Nodes:
    """Random ragged trees of few tokens, siblings distinct."""
    tokens, parents, depth = (torch.zeros(batch, width, dtype=torch.int64) for _ in range(3))
    valid = torch.arange(width) < torch.randint(0, width + 1, (batch, 1), generator=generator)
    for b in range(batch):
        seen: set[tuple[int, int]] = set()
        for i in range(width):
            while True:
                parent = int(torch.randint(-1, i, (1,), generator=generator)) if i else -1
                token = int(torch.randint(0, 8, (1,), generator=generator))
                if (parent, token) not in seen:
                    break
            seen.add((parent, token))
            tokens[b, i], parents[b, i], depth[b, i] = token, parent, 1 + (int(depth[b, parent]) if parent >= 0 else 0)
    return Nodes(tokens, parents, depth, valid)


@pytest.mark.parametrize("tail", [False, True])
def test_filling_equals_the_reference_on_random_trees(tail: bool) -> None:
    """Duplicates merge and cost nothing, gaps in the table cut what hangs below, slots and depth run out."""
    generator, template, merged = torch.Generator().manual_seed(2), rank_paths((4, 5, 3, 2), 4), 0
    table = Adjacency(8, 4, torch.device("cpu"))
    table.update(torch.arange(7), torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(7)]))
    shape = rank_template((4, 5, 3, 2), 4, torch.device("cpu"))
    for width in (0, 1, 4, 7, 7, 7, 7, 7):
        kept, batch = random_kept(generator, 40, width), 40
        plain = as_draft(kept)
        below = torch.full((batch,), -1)
        roots = torch.randint(0, 8, (batch,), generator=generator)
        if tail and width > 0:
            below = (kept.valid.sum(1) + 1) // 2 - 1  # some node, also one that has children to merge with
            roots = kept.tokens.gather(1, below.clamp(min=0)[:, None])[:, 0].where(below >= 0, roots)
        retrieved = table.descend(roots, shape)
        free, room = (torch.randint(0, high, (batch,), generator=generator) for high in (15, 7))
        draft = as_draft(graft(kept, shape, retrieved, below, free, room))
        for b in range(batch):
            before = paths(plain, b)
            at = before[int(below[b])] if int(below[b]) >= 0 else ()
            added = slow_graft(before, at, template, retrieved[b].tolist(), int(free[b]), int(room[b]))
            assert paths(draft, b) == before + added
            merged += len({(*at, int(t)) for t in retrieved[b, :4]} & set(before))
    assert merged > 20


# --- the head's tree --------------------------------------------------------------------------------------------------


class SlowHead:
    """Log-probabilities after text and path by one full attention over all pairs, no cache, one path at a time."""

    def __init__(self, head: Eagle3Head, policy: Policy, text: list[int], temperature: float) -> None:
        self.head, self.policy, self.temperature = head, policy, temperature
        with torch.no_grad(), AuxiliaryStates(policy.model, head.config.layers) as aux_layers:
            policy.model(torch.tensor([text[:-1]]), use_cache=False)
        features = aux_layers.features()
        assert features is not None
        self.text, self.fused = text, head.fuse(features)

    @torch.no_grad()
    def __call__(self, path: Path_) -> Tensor:  # [D]
        hidden = self.fused
        for step in range(len(path) + 1):
            tokens = torch.tensor([[*self.text[1:], *path[:step]]])
            embedded = self.policy.model.get_input_embeddings()(tokens)
            query, key, value = self.head.query_key_value(embedded, hidden, torch.arange(tokens.shape[1])[None])
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            last = self.head.finish(hidden, out.transpose(1, 2))[:, -1:]
            hidden = torch.cat([hidden, last], 1)
        return (self.head.logits(last[0, 0]) / self.temperature).log_softmax(-1)


def slow_tree(head: SlowHead, settings: GraftConfig, room: int) -> list[Path_]:
    """EAGLE-2's tree with Graft's checkpoints, path by path."""
    scored: dict[Path_, float] = {}
    frontier: list[tuple[float, Path_]] = [(0.0, ())]
    quota = settings.nodes
    for expanded in range(min(settings.depth, room)):
        grown = []
        for score, path in frontier:
            best = head(path).topk(settings.width)
            grown += [(score + float(p), (*path, int(t))) for p, t in zip(best.values, best.indices, strict=True)]
        scored |= {path: score for score, path in grown}
        frontier = sorted(grown, reverse=True)[: settings.width]
        if expanded in settings.checkpoints:
            number = settings.checkpoints.index(expanded)
            if torch.tensor(frontier[0][0]).exp() < settings.thresholds[number]:
                quota = settings.keep[number]
                break
    return sorted(scored, key=lambda path: -scored[path])[:quota]


def first_tree(drafter: GraftDrafter, policy: Policy, texts: list[list[int]], room: int, temperature: float) -> Draft:
    """What the drafter proposes right after prompts have entered."""
    proposed: list[Draft] = []
    original = drafter.propose
    drafter.propose = lambda rows, budget: proposed.append(original(rows, budget)) or proposed[-1]  # type: ignore
    engine = LocalEngine(policy, drafter, k=drafter.settings.nodes, slots=len(texts))
    engine.generate(texts, max_new_tokens=room + 1, temperature=temperature)
    drafter.propose = original  # type: ignore[method-assign]
    return proposed[0]


TEXTS = [[5, 6, 7, 9], [9, 4], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [30] * 20, [11, 7, 41], [8, 8, 2]]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_pruned_tree_equals_the_reference(policy: Policy, temperature: float) -> None:
    """Rows stop at different checkpoints, ragged texts, a depth that room cuts off."""
    settings = GraftConfig(
        nodes=20, width=3, depth=5, checkpoints=(0, 1, 3), thresholds=(0.2, 0.12, 0.03), keep=(2, 5, 9),
        variant="prune", template=(1,),
    )  # fmt: skip
    sizes = set()
    for room in (1, 3, 12):
        drafter = make(policy, settings, scale=0.35)
        draft = first_tree(drafter, policy, TEXTS, room, temperature)
        head = drafter.head
        for row, text in enumerate(TEXTS):
            expected = slow_tree(SlowHead(head, policy, text, temperature or 1.0), settings, room)
            assert paths(draft, row) == expected, (room, row)
            sizes.add(len(expected))
    assert len(sizes) >= 3, f"all rows stopped alike, with {sizes} nodes"


def test_freed_slots_are_filled_to_the_budget(policy: Policy) -> None:
    """Prune-then-graft: a tree never has more than its nodes, and has all of them once the table knows enough."""
    for variant in VARIANTS:
        settings = SMALL.model_copy(update={"variant": variant, "thresholds": (0.9, 0.9)})
        drafter = make(policy, settings)
        learn_everything(drafter, policy)
        draft = first_tree(drafter, policy, TEXTS, 8, 1.0)
        expected = {"graft": 12, "root": 12, "tail": 12, "prune": 3, "eagle": 12}[variant]
        sizes = draft.lengths.tolist()
        assert max(sizes) <= 12 and max(sizes) == expected
        stops = {k for k in drafter.metrics() if k.startswith("stopped")}
        assert stops == ({"stopped_never"} if variant in ("root", "eagle") else {"stopped_0"})


def learn_everything(drafter: GraftDrafter, policy: Policy) -> None:
    with torch.no_grad():
        every = torch.arange(policy.model.config.vocab_size)
        rows = policy.model(every[:, None]).logits[:, 0]
    drafter.adjacency.update(every, rows.topk(drafter.successors).indices)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_all_verified_nodes_are_learnt_from(policy: Policy) -> None:
    """Root, accepted and rejected nodes alike: the policy's likeliest successors after each of their paths."""
    drafter, updates = make(policy), []
    learn_everything(drafter, policy)
    original = drafter.adjacency.update
    drafter.adjacency.update = lambda tokens, likeliest: (  # type: ignore
        updates.append((tokens, likeliest)) or original(tokens, likeliest)
    )
    draft = first_tree(drafter, policy, TEXTS, 6, 1.0)
    tokens, likeliest = updates[0]
    at, expected_tokens = count(), []
    for row, text in enumerate(TEXTS):
        for path in ((), *paths(draft, row)):
            ids = [*text, *path]
            expected_tokens.append(ids[-1])
            with torch.no_grad():
                logits = policy.model(torch.tensor([ids])).logits[0, -1]
            mine, theirs = logits[likeliest[next(at)]], logits.topk(drafter.successors).values
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert tokens.tolist() == expected_tokens and len(tokens) > 30


# --- at work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_plain(policy: Policy, variant: str) -> None:
    contract.check_greedy_identity(policy, partial(make, policy, SMALL.model_copy(update={"variant": variant})), 12)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_greedy_equals_plain_with_the_papers_tree(tiny: Callable[..., Path], family: str) -> None:
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    contract.check_greedy_identity(policy, partial(make, policy, PAPER), 60)


def test_every_end(policy: Policy) -> None:
    """Also at the last position of the context, where rows have room for ever shallower trees."""
    rollouts = contract.check_every_end(policy, partial(make, policy))
    assert any(r.drafted[-1] for r in rollouts if r.finish_reason == "eos"), "no accepted draft was an end token"


def test_stop_strings(policy: Policy) -> None:
    contract.check_stop_strings(policy, partial(make, policy))


def test_logprobs_are_the_policys(policy: Policy) -> None:
    contract.check_logprobs(policy, partial(make, policy))


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama", vocab_size=12, initializer_range=0.25)), "float32", "cpu")


def exact_law(policy: Policy, temperature: float) -> dict[Path_, float]:
    """Probability of every text of up to three tokens after `contract.LAW_PROMPT`; the end token (0) ends it."""

    def grow(text: Path_, p: float) -> Iterator[tuple[Path_, float]]:
        if len(text) == 3 or text[-1:] == (0,):
            yield text, p
            return
        with torch.no_grad():
            row = policy.model(torch.tensor([[*contract.LAW_PROMPT, *text]])).logits[0, -1].double() / temperature
        for token, q in enumerate(row.softmax(-1).tolist()):
            yield from grow((*text, token), p * q)

    return dict(grow((), 1.0))


def law_p_value(policy: Policy, temperature: float, fault: str | None = None) -> float:
    settings = GraftConfig(nodes=6, width=2, depth=3, checkpoints=(0,), thresholds=(0.3,), keep=(2,), template=(3, 3))
    verifier = {} if fault is None else {"tree_verifier": lambda _, inputs: BROKEN_TREE[fault].rule(inputs)}
    engine = LocalEngine(policy, make(policy, settings), k=6, slots=1000, **verifier)  # type: ignore[arg-type]
    rollouts = engine.generate(
        [contract.LAW_PROMPT], max_new_tokens=3, temperature=temperature, n=contract.LAW_SAMPLES, seed=1
    )
    metrics = engine.metrics()
    assert metrics["acceptance_per_position"][1] > 0.05, "too little was speculated: the test would be idle"
    assert metrics["drafter"]["retrieved_nodes"] > 1000 < metrics["drafter"]["drafted_nodes"]
    return p_value_of_texts(Counter(tuple(r.tokens) for r in rollouts), exact_law(policy, temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_samples_the_policy(small: Policy, temperature: float) -> None:
    """20,000 samples of three tokens, V = 12; a correct engine fails less than once in a million seeds."""
    assert law_p_value(small, temperature) > 1e-6


@pytest.mark.parametrize("fault", ["walk_no_residual", "parent_row_off_by_one"])
def test_a_broken_rule_is_caught(small: Policy, fault: str) -> None:
    """Power: drafts too frequent, or verified by another branch's row; both change the distribution by percents."""
    assert law_p_value(small, 1.0, fault) < 1e-6


# --- non-anticipation -------------------------------------------------------------------------------------------------


def test_trees_do_not_depend_on_what_will_be_sampled(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other seeds, that is other uniforms for the tokens to come, give the same tree; no uniform is drawn to draft."""

    def never(*_: object) -> Tensor:
        raise AssertionError("a uniform was drawn while drafting")

    monkeypatch.setattr("forerun.drafters.sampled.uniforms", never)
    drafter = make(policy)
    learn_everything(drafter, policy)
    table = drafter.adjacency.table.clone()
    trees = []
    for seed in (0, 1, 2):
        drafter.adjacency.table.copy_(table)
        captured: list[tuple[Rows, Draft]] = []
        original = drafter.propose
        drafter.propose = lambda r, b, o=original, c=captured: c.append((r, o(r, b))) or c[-1][1]  # type: ignore
        LocalEngine(policy, drafter, k=12, slots=6).generate(TEXTS, max_new_tokens=20, seed=seed)
        drafter.propose = original  # type: ignore[method-assign]
        trees.append(captured[0])
    for rows, draft in trees[1:]:
        assert not torch.equal(rows.seeds, trees[0][0].seeds)
        assert torch.equal(draft.tokens, trees[0][1].tokens) and torch.equal(draft.lengths, trees[0][1].lengths)
        assert draft.parents is not None and trees[0][1].parents is not None
        assert torch.equal(draft.parents, trees[0][1].parents) and draft.log_q is None
    assert int(trees[0][1].lengths.sum()) > 30


# --- settings and files -----------------------------------------------------------------------------------------------


def test_presets_and_recipes() -> None:
    assert (PAPER.nodes, PAPER.keep, sum(PAPER.template)) == (60, (8, 24, 40), 52)
    assert GraftConfig(preset="paper", nodes=50).nodes == 50 and SMALL.nodes == 12
    again = GraftConfig.model_validate(PAPER.model_dump(mode="json"))
    assert again == PAPER
    speculation = load_recipe(
        "quickstart", {"speculation.method": "graft", "speculation.graft.preset": "paper"}
    ).speculation
    assert speculation.tokens == 60 and GraftDrafter.trains
    assert speculation.model_copy(update={"k": 0}).tokens == 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"keep": [3]}, "have 2, 2 and 1 entries"),
        ({"checkpoints": [1, 0]}, "must ascend"),
        ({"keep": [3, 40]}, "between 0 and nodes 12"),
        ({"template": [9]}, "9 nodes cannot stand below 1 nodes with 8 successors"),
        ({"nodes": 128}, "less than or equal to 127"),
    ],
)
def test_mistakes_in_settings_are_reported(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        GraftConfig.model_validate(values)


def test_saved_and_loaded_with_its_table(policy: Policy, tmp_path: Path) -> None:
    random_drafter(policy).save(tmp_path / "head", {})
    block = SpeculationConfig(method="graft", draft=str(tmp_path / "head"))
    drafter = load_drafter(policy, block)
    assert isinstance(drafter, GraftDrafter) and int(drafter.adjacency.table.max()) == -1
    engine = LocalEngine(policy, drafter, k=block.tokens, slots=4)
    assert engine.load(pack_weights(2, policy, drafter)).version == 2
    engine.generate(TEXTS, max_new_tokens=12)
    assert int((drafter.adjacency.table[:, 0] >= 0).sum()) > 10
    drafter.save(tmp_path / "both", {"steps": 1})
    again = load_drafter(policy, block.model_copy(update={"draft": str(tmp_path / "both")}))
    assert isinstance(again, GraftDrafter)
    assert torch.equal(again.adjacency.table, drafter.adjacency.table)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in drafter.state_dict().items())
    with pytest.raises(UserError, match="is of 9 tokens and the policy has"):
        again.adjacency.load(torch.zeros(9, 2))
    (tmp_path / "both" / "adjacency.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        load_drafter(policy, block.model_copy(update={"draft": str(tmp_path / "both")}))
    with pytest.raises(UserError, match=r"needs speculation\.draft"):
        load_drafter(policy, SpeculationConfig(method="graft"))
