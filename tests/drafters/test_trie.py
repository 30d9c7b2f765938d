"""The corpus against its slow reference, its memory, and the drafter at work."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

import drafter_contract as contract
from forerun.config import SpeculationConfig, TrieConfig
from forerun.drafters import load_drafter
from forerun.drafters.base import Rows
from forerun.drafters.trie import Corpus, TrieDrafter
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.training.weights import pack_weights
from forerun.types import Draft, VerifyResult
from proofs.lookups import reference_continuation

SHORT = TrieConfig(match_min=1, match_max=6)
make = partial(TrieDrafter, SHORT)


def fill(corpus: Corpus, texts: Sequence[tuple[list[int], list[int]]], mark: int = 0) -> None:
    """Whole samples (prompt, tokens) into a corpus; prompts that follow one another are one visit."""
    seen: list[int] = []
    for prompt, tokens in texts:
        scope = corpus.visit(prompt, mark) if prompt != seen else prompt_scope(corpus, prompt)
        seen = prompt
        corpus.extend(corpus.begin(scope, prompt[-corpus.settings.match_max :]), tokens)


def prompt_scope(corpus: Corpus, prompt: list[int]) -> bytes:
    return torch.tensor(prompt, dtype=torch.int32).numpy().tobytes() if corpus.settings.scope == "prompt" else b""


def held(corpus: Corpus) -> list[tuple[int, list[int]]]:
    """(head, tokens) of all texts, oldest first."""
    return [(t.head, corpus.tokens_of(t).tolist()) for t in corpus.texts.values()]


def feed(drafter: TrieDrafter, tokens: list[list[int]], lengths: list[int]) -> None:
    """Let rows 0, 1, .. emit these tokens."""
    width = max(map(len, tokens))
    padded = torch.tensor([t + [0] * (width - len(t)) for t in tokens])
    rows = rows_of([t[-1] for t in tokens], lengths)
    counts = torch.tensor([len(t) - 1 for t in tokens])
    drafter.observe(rows, VerifyResult(counts, padded, torch.zeros(len(tokens), width)), None)


def rows_of(last: list[int], lengths: list[int]) -> Rows:
    n = len(last)
    return Rows(torch.tensor(last), torch.tensor(lengths), torch.arange(n), torch.ones(n))


def propose(drafter: TrieDrafter, last: list[int], lengths: list[int], k: int) -> list[list[int]]:
    draft: Draft = drafter.propose(rows_of(last, lengths), torch.full((len(last),), k))
    return [t[:n] for t, n in zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("scope", ["prompt", "global"])
def test_walk_equals_the_reference_on_random_texts(scope: str) -> None:
    """Interleaved samples, three prompts, epochs, a window, a bound: at any time the draft is the reference's."""
    rng, drafted, removed = random.Random(1), 0, 0
    for _ in range(25):
        settings = TrieConfig(
            scope=scope, match_min=rng.randint(1, 3), match_max=rng.randint(3, 8), floor=rng.choice([0.0, 0.1, 0.4]),
            window=rng.randint(1, 3), max_tokens=rng.choice([60, 400, 10**6]),
        )  # fmt: skip
        corpus, alphabet = Corpus(settings), rng.randint(2, 5)
        prompts = [[rng.randrange(alphabet) for _ in range(rng.randint(1, 12))] for _ in range(3)]
        for mark in range(4):
            live = []
            for prompt in rng.sample(prompts, rng.randint(1, 3)):
                key, recent = corpus.visit(prompt, mark), prompt[-settings.match_max :]
                live += [[key, recent, corpus.begin(key, recent)] for _ in range(3)]
            for _ in range(12):
                for row in live:
                    tokens = [rng.randrange(alphabet) for _ in range(rng.randint(1, 3))]
                    corpus.extend(row[2], tokens)
                    row[1] = (row[1] + tokens)[-settings.match_max :]
                key, recent, _ = rng.choice(live)
                texts = [(t.head, corpus.tokens_of(t).tolist()) for t in corpus.texts.values() if t.scope == key]
                expected = reference_continuation(texts, recent, 4, settings)
                assert corpus.continuation(key, recent, 4) == expected
                drafted += bool(expected)
                assert corpus.counts.tokens == sum(t.length for t in corpus.texts.values()) <= settings.max_tokens
        removed += corpus.counts.evicted_texts + corpus.counts.expired_texts
    assert drafted > 500 and removed > 100


@pytest.mark.parametrize(
    ("floor", "expected"),
    [(0.0, [5, 8, 9]), (0.6, [5]), (0.7, [])],
)
def test_most_frequent_token_then_its_own_followers(floor: float, expected: list[int]) -> None:
    """After [1, 2]: 5 in two of three; after [1, 2, 5] only those two vote, and of equals the newest text wins."""
    corpus = Corpus(TrieConfig(match_min=2, floor=floor))
    fill(corpus, [([0], [1, 2, 5, 7, 7]), ([0], [1, 2, 6, 3]), ([0], [1, 2, 5, 8, 9])])
    assert corpus.continuation(prompt_scope(corpus, [0]), [4, 1, 2], 4) == expected


def test_a_prompt_votes_once_however_many_samples_it_has() -> None:
    corpus = Corpus(TrieConfig(match_min=1, match_max=2))
    fill(corpus, [([7, 8], [1])] * 5 + [([7, 8], [7, 5]), ([7, 8], [7, 5])])
    assert corpus.continuation(prompt_scope(corpus, [7, 8]), [7], 1) == [5]  # 5 twice, 8 once


def test_drafts_come_from_live_siblings() -> None:
    """The second sample's first drafts are what the first one has committed; no other tokens exist."""
    drafter = make()
    drafter.open(4, 32, 4)
    drafter.prefill(2, torch.tensor([[4, 5, 6], [1, 2, 3]]), torch.tensor([3, 3]), None)
    for source, target in ((2, 0), (2, 1)):
        drafter.copy(source, target)
    assert propose(drafter, [6, 6], [2, 2], 3) == [[], []]
    feed(drafter, [[10, 11, 12, 13], [20]], [2, 2])
    assert propose(drafter, [13, 20], [6, 3], 3) == [[], []]  # neither has come where the other was
    drafter.copy(2, 3)  # a third sample begins
    drafter.copy(3, 1)  # and moves into the place of the second
    assert propose(drafter, [13, 6], [6, 2], 3)[1] == [20]  # 10 and 20 began once each; 20 is of the newer text
    feed(drafter, [[14], [10]], [6, 2])
    assert propose(drafter, [14, 10], [7, 3], 4)[1] == [11, 12, 13, 14]
    assert drafter.metrics()["texts"] == 2 + 3


def test_window_forgets_epochs_of_a_prompt_and_counts_them() -> None:
    corpus = Corpus(TrieConfig(window=2, match_min=1))
    for mark in range(4):
        fill(corpus, [([0, mark_of_other], [1]) for mark_of_other in ([9] if mark == 0 else [])], mark)
        fill(corpus, [([0], [1, 2, 10 + mark])], mark)
    samples = [tokens for head, tokens in held(corpus) if head == 1]
    assert samples == [[0, 1, 2, 12], [0, 1, 2, 13]]  # epochs 3 and 4 of this prompt
    assert corpus.counts.expired_texts == 2 and corpus.counts.expired_tokens == 8
    assert [0, 9] in [tokens for _, tokens in held(corpus)]  # another prompt, not seen since: its window does not move
    assert corpus.counts.evicted_texts == 0


@pytest.mark.parametrize("scope", ["prompt", "global"])
def test_a_full_corpus_throws_out_the_oldest_and_counts_it(scope: str) -> None:
    corpus = Corpus(TrieConfig(scope=scope, max_tokens=20, match_min=1, match_max=2))
    for i in range(6):  # each a prompt of 2, and a sample of 2 + 4 tokens
        fill(corpus, [([i, i], [50, 51, 52, 60 + i])], i)
    counts = corpus.counts
    assert [tokens[-1] for _, tokens in held(corpus)] == [4, 64, 5, 65]  # a text goes whole
    assert counts.tokens == sum(len(t) for _, t in held(corpus)) == 16 and counts.texts == 4
    assert (counts.evicted_texts, counts.evicted_tokens) == (8, 6 * 8 - 16)
    assert len(corpus.scopes) == (2 if scope == "prompt" else 1)
    places = sum(len(p) for s in corpus.scopes.values() for p in s.places.values())
    assert places == sum(len(t) - max(head, 1) for head, t in held(corpus))  # the index forgets too


def test_a_sample_larger_than_the_corpus_is_forgotten_but_goes_on() -> None:
    drafter = TrieDrafter(TrieConfig(max_tokens=6, match_min=1))
    drafter.open(2, 32, 4)
    drafter.prefill(1, torch.tensor([[1, 2]]), torch.tensor([2]), None)
    drafter.copy(1, 0)
    for step in range(5):
        feed(drafter, [[5, 6]], [1 + 2 * step])
        assert propose(drafter, [6], [3 + 2 * step], 2) in ([[]], [[5, 6]])
    assert drafter.metrics()["tokens"] == 0 and drafter.metrics()["evicted_texts"] == 2


def test_scoped_beats_global_where_prompts_disagree() -> None:
    """Two prompts whose answers share their tokens but not their order; the other one is sampled ten times as often."""
    rng = random.Random(3)
    answers = {prompt: [rng.randrange(6) for _ in range(200)] for prompt in (7, 8)}
    accepted = {}
    for scope in ("prompt", "global"):
        corpus = Corpus(TrieConfig(scope=scope, match_max=3))
        fill(corpus, [([7], answers[7])] + [([8], answers[8])] * 10)
        key, text, hits = prompt_scope(corpus, [7]), [7, *answers[7]], 0
        for end in range(3, len(text) - 3):
            draft = corpus.continuation(key, text[:end], 3)
            hits += next((j for j, t in enumerate(draft) if t != text[end + j]), len(draft))
        accepted[scope] = hits
    assert accepted["prompt"] > 1.5 * accepted["global"] > 0


def test_greedy_identity(policy: Policy) -> None:
    for settings in (SHORT, TrieConfig(scope="global", match_min=1, max_tokens=200)):
        rollouts = contract.check_greedy_identity(policy, partial(TrieDrafter, settings), 4)
        assert any(any(r.drafted) for r in rollouts)


def test_every_end(policy: Policy) -> None:
    contract.check_every_end(policy, make)


def test_a_drafted_end_token_ends_the_sample(policy: Policy) -> None:
    engine = LocalEngine(policy, make(), k=4, slots=8)
    prompts = [[a, b] for a in range(1, 55) for b in (1, 2)]
    first, again = (engine.generate(prompts, max_new_tokens=24, temperature=0.0) for _ in range(2))
    ended = [r for r in again if r.finish_reason == "eos"]
    assert any(r.drafted[-1] for r in ended) and any(not r.drafted[-1] for r in ended)
    assert [r.tokens for r in again] == [r.tokens for r in first]


def test_stop_strings(policy: Policy) -> None:
    contract.check_stop_strings(policy, make)


def test_logprobs(policy: Policy) -> None:
    contract.check_logprobs(policy, make)


def test_the_corpus_holds_what_the_samples_hold(policy: Policy) -> None:
    """Accepted drafts behind a stop string are no part of the sample, so neither of the corpus."""
    drafter = make()
    engine = LocalEngine(policy, drafter, k=6, slots=4)
    whole = engine.generate(contract.PROMPTS, max_new_tokens=40, temperature=0.0)
    stop = [policy.tokenizer.decode(r.tokens[12:13]) for r in whole[:2]]
    cut = engine.generate(contract.PROMPTS, max_new_tokens=40, temperature=0.0, stop=stop)
    shortened = [r for r in cut if r.finish_reason == "stop"]
    assert any(all(r.drafted[-3:]) for r in shortened), "no run of accepted drafts was cut: the test would be idle"
    expected = sorted(r.prompt_ids[-SHORT.match_max :] + r.tokens for r in [*whole, *cut])
    corpus = drafter.corpus
    assert sorted(corpus.tokens_of(t).tolist() for t in corpus.texts.values() if not t.is_prompt) == expected
    assert engine.metrics()["drafter"]["texts"] == len(expected) + len(contract.PROMPTS)


def test_the_second_epoch_is_drafted_from_the_first(policy: Policy) -> None:
    """At temperature 0.1 this policy nearly repeats itself; one sample per prompt, so that no sibling helps."""
    engine = LocalEngine(policy, make(), k=4, slots=8)
    prompts = [[i, i + 1, i + 2] for i in range(1, 41)]
    lengths = []
    for epoch in range(2):
        before = engine.counters.copy()
        engine.generate(prompts, max_new_tokens=24, temperature=0.1, seed=epoch)
        lengths.append(engine.counters.minus(before).acceptance_length)
    assert lengths[1] > lengths[0] + 0.2
    greedy = LocalEngine(policy, make(), k=4, slots=8)
    first = greedy.generate(prompts, max_new_tokens=24, temperature=0.0)
    again = greedy.generate(prompts, max_new_tokens=24, temperature=0.0)
    assert [r.tokens for r in again] == [r.tokens for r in first]
    assert sum(r.rounds for r in again) < 0.5 * sum(r.rounds for r in first)


def test_a_weight_version_leaves_the_corpus_alone(policy: Policy) -> None:
    drafter = make()
    engine = LocalEngine(policy, drafter, k=3, slots=4)
    assert engine.load(pack_weights(1, policy, drafter)).version == 1
    engine.generate(contract.PROMPTS, max_new_tokens=8)
    before = drafter.metrics()
    assert engine.load(pack_weights(2, policy, drafter)).checksums["draft"] == "0" * 16  # no weights, no bytes
    assert drafter.metrics() == before and before["tokens"] > 0


def test_saved_and_loaded_corpus_goes_on_the_same(policy: Policy, tmp_path: Path) -> None:
    """A run that is killed and resumed drafts, and so samples, what it would have."""
    settings = TrieConfig(match_min=1, window=2, max_tokens=300)
    drafter = TrieDrafter(settings)
    LocalEngine(policy, drafter, k=3, slots=4).generate(contract.PROMPTS, max_new_tokens=30, temperature=0.5, n=3)
    drafter.save(tmp_path, {"run": "x"})
    resumed = SpeculationConfig(method="trie", draft=str(tmp_path), trie=settings)
    again = load_drafter(policy, resumed)
    assert isinstance(again, TrieDrafter) and again.metrics() == drafter.metrics()
    assert drafter.metrics()["evicted_texts"] > 0
    runs = [
        LocalEngine(policy, d, k=3, slots=4).generate(contract.PROMPTS, max_new_tokens=30, temperature=0.5, n=3, seed=8)
        for d in (drafter, again)
    ]
    assert [(r.tokens, r.drafted) for r in runs[0]] == [(r.tokens, r.drafted) for r in runs[1]]
    assert any(any(r.drafted) for r in runs[0])
    assert again.metrics() == drafter.metrics()


def test_broken_or_foreign_corpora_are_errors(policy: Policy, tmp_path: Path) -> None:
    make().save(tmp_path, {})  # an empty one
    assert TrieDrafter.load(tmp_path, SHORT).metrics()["texts"] == 0
    with pytest.raises(UserError, match=r"has scope 'prompt', and speculation.trie.scope is 'global'"):
        TrieDrafter.load(tmp_path, TrieConfig(scope="global"))
    (tmp_path / "corpus.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        TrieDrafter.load(tmp_path, SHORT)
    with pytest.raises(UserError, match="cannot be read: FileNotFoundError"):
        load_drafter(policy, SpeculationConfig(method="trie", draft=str(tmp_path / "nothing")))


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama", vocab_size=12, initializer_range=0.25)), "float32", "cpu")


@pytest.mark.parametrize(("scope", "faulty"), [("prompt", False), ("global", False), ("prompt", True)])
def test_samples_follow_the_policys_law(small: Policy, scope: str, faulty: bool) -> None:
    """A correct engine fails this less than once in a million seeds; the broken rule lies several percent away."""
    p = contract.law_p_value(small, partial(TrieDrafter, TrieConfig(scope=scope, floor=0.0, max_tokens=2000)), faulty)
    assert p < 1e-6 if faulty else p > 1e-6
