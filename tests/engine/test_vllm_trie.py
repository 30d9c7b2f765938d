"""The trie as vLLM's proposer: drafts out of the same prompt's samples alone, as the local engine drafts them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forerun.config import TrieConfig
from forerun.drafters.base import Rows
from forerun.drafters.trie import Corpus, TrieDrafter
from forerun.engine.base import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.engine.vllm.proposer import Siblings
from forerun.errors import UserError
from forerun.models import Policy
from forerun.types import Rollout, VerifyResult
from vllm_tiny import PROMPTS, TOLERANCE, changed, law, make, needs_vllm, texts, version, without_repair

slow = pytest.mark.slow
K = 3
EAGER = {"match_min": 2, "floor": 0.1}  # drafts much, also where an untrained policy hardly knows
BLOCK = {"method": "trie", "k": K, "trie": EAGER}
GREEDY = Sampling(24, 0.0)


# ---- without vLLM ----


@pytest.mark.parametrize("scope", ["prompt", "global"])
@pytest.mark.parametrize("most", [100, 10**6])
def test_siblings_draft_what_the_drafter_of_the_local_engine_drafts(scope: str, most: int) -> None:
    """One trace of random rounds into both, with eviction and without, over more epochs than the window holds."""
    settings = TrieConfig.model_validate({"scope": scope, "window": 2, "max_tokens": most, "floor": 0.3})
    theirs, ours = TrieDrafter(settings), Siblings(Corpus(settings))
    draw = torch.Generator().manual_seed(3)
    prompts, drafted = [[1, 2, 3], [4, 2, 3]], 0
    for epoch in range(4):
        theirs.open(8, 64, K)
        ours.open()
        rows = [(f"{epoch}.{row}", prompts[row // 2], list[int]()) for row in range(4)]
        for row, (_, prompt, _) in enumerate(rows):
            if row % 2 == 0:
                theirs.prefill(8, torch.tensor([prompt]), torch.tensor([3]), None)
            theirs.copy(8, row)
        for step in range(10):
            sizes = torch.randint(1, K + 2, (4,), generator=draw).tolist()
            new = [torch.randint(1, 4, (size,), generator=draw).tolist() for size in sizes]
            _observe(theirs, new)
            for (name, prompt, tokens), more in zip(rows, new, strict=True):
                tokens += more
                ours.take(name, prompt, tokens, len(tokens))
            budget = torch.tensor([K, step % (K + 1), 1, K])
            draft = theirs.propose(_rows(new), budget)
            expected = [t[:n] for t, n in zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)]
            places = zip(rows, budget.tolist(), strict=True)
            assert [ours.draft(r[0], (r[1] + r[2])[-settings.match_max :], n) for r, n in places] == expected
            drafted += sum(map(len, expected))
    assert drafted > 50, "a trie that drafts nothing shows nothing"
    assert ours.corpus.counts == theirs.corpus.counts
    assert (ours.corpus.counts.evicted_texts > 0) == (most == 100)


def test_a_sample_drafts_from_siblings_that_are_not_done() -> None:
    siblings = Siblings(Corpus(TrieConfig(**EAGER)))
    siblings.open()
    siblings.take("a", [7, 8, 9], [1, 2, 3, 4], 4)
    siblings.take("b", [7, 8, 9], [1], 1)
    siblings.take("c", [6, 8, 9], [1], 1)
    assert siblings.draft("b", [7, 8, 9, 1], 3) == [2, 3, 4]
    assert siblings.draft("c", [6, 8, 9, 1], 3) == []
    siblings.keep({"b"})
    assert siblings.draft("b", [7, 8, 9, 1], 2) == [2, 3]  # a is done, its text stays


def _rows(new: list[list[int]]) -> Rows:
    n = len(new)
    return Rows(torch.tensor([t[-1] for t in new]), torch.full((n,), 9), torch.arange(n), torch.ones(n))


def _observe(drafter: TrieDrafter, new: list[list[int]]) -> None:
    width = max(map(len, new))
    tokens = torch.tensor([t + [0] * (width - len(t)) for t in new])
    accepted = torch.tensor([len(t) - 1 for t in new])
    drafter.observe(_rows(new), VerifyResult(accepted, tokens, torch.zeros(len(new), width)), None)


# ---- with vLLM ----


@pytest.fixture(scope="module")
def made(small: Policy) -> Iterator[Any]:
    engine = make(small, TrieDrafter(TrieConfig(**EAGER)), BLOCK, slots=16)
    yield engine
    engine.close()


@pytest.fixture
def trie(made: Any, small: Policy) -> Any:
    """The engine with an empty corpus and the first weights."""
    made.load(version(0, small, TrieDrafter(TrieConfig(**EAGER))))
    empty(made, TrieConfig(**EAGER))
    return made


def empty(engine: Any, settings: TrieConfig) -> None:
    """An empty corpus of other settings."""

    def replace(worker: Any) -> None:
        worker.model_runner.drafter.siblings = Siblings(Corpus(settings))

    engine._vllm.collective_rpc(replace)


def corpus_of(engine: Any) -> Corpus:
    return engine._vllm.collective_rpc(lambda worker: worker.model_runner.drafter.siblings.corpus)[0]


def samples_of(corpus: Corpus) -> list[list[int]]:
    """Tokens of all samples without their prompts' ends."""
    return sorted(corpus.tokens_of(t)[t.head :].tolist() for t in corpus.texts.values() if not t.is_prompt)


def fewest(rollouts: list[Rollout]) -> int:
    """Rounds if every draft were as long as it may be and kept: one for the first token, then k + 1 a round."""
    return sum(1 + -(-(len(r.tokens) - 1) // (K + 1)) for r in rollouts)


@needs_vllm
@slow
def test_greedy_texts_are_plain_and_the_second_epoch_is_drafted_from_the_first(trie: Any, small: Policy) -> None:
    """Every sample of the second epoch repeats the first's: what is missing to the fewest rounds are wrong drafts."""
    expected = LocalEngine(small, slots=8).generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=3)
    rounds = []
    for _ in range(2):
        ours = trie.generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=3)
        assert texts(ours) == texts(expected)
        assert [r.finish_reason for r in ours] == [r.finish_reason for r in expected]
        rounds.append(sum(r.rounds for r in ours))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=TOLERANCE, rtol=0)
    assert rounds[1] <= 1.05 * fewest(expected) < 0.5 * rounds[0]
    assert samples_of(corpus_of(trie)) == sorted(texts(expected) * 2)  # nothing behind an end, nothing missing
    metrics = trie.metrics()
    assert metrics["rule"] == "token"
    assert metrics["drafter"]["texts"] == len(PROMPTS) * (1 + 2 * 3)


@needs_vllm
@slow
def test_a_live_sibling_is_drafted_from(small: Policy) -> None:
    """The second prompt is done after 15 tokens; then a sibling of the first, which is not, takes its place."""
    engine = make(small, TrieDrafter(TrieConfig(**EAGER)), BLOCK, slots=2)
    first, short, second = engine.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], max_new_tokens=24, temperature=0.0)
    assert 10 < len(short.tokens) < 20
    assert first.tokens == second.tokens
    assert sum(second.drafted[1:10]) >= 5  # of tokens that it emits while the first goes on
    engine.close()


@needs_vllm
@slow
@pytest.mark.parametrize("scope", ["prompt", "global"])
def test_drafts_come_from_the_same_prompts_samples_alone(
    trie: Any, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that end alike. With all prompts in one trie, the control, the same look finds strangers' drafts."""
    empty(trie, TrieConfig.model_validate({"scope": scope, **EAGER}))
    prompts = [[first, 5, 6] for first in range(10, 22)]
    seen: list[tuple[tuple[int, ...], list[int], list[int]]] = []
    proposer = trie._vllm.collective_rpc(lambda worker: worker.model_runner.drafter)[0]
    draft = proposer.siblings.draft

    def watch(name: str, context: list[int], most: int) -> list[int]:
        prompt = tuple(proposer._runner.requests[name].prompt_token_ids)
        seen.append((prompt, context, draft(name, context, most)))
        return seen[-1][2]

    monkeypatch.setattr(proposer.siblings, "draft", watch)
    said: dict[tuple[int, ...], list[list[int]]] = {tuple(p): [p] for p in prompts}
    for seed in range(2):
        for rollout in trie.generate(prompts, max_new_tokens=40, n=4, seed=seed):
            said[tuple(rollout.prompt_ids)].append(rollout.prompt_ids + rollout.tokens)
    used = [(prompt, context[-2:] + tokens) for prompt, context, tokens in seen if tokens]
    own = [any(within(run, text) for text in said[prompt]) for prompt, run in used]
    assert len(own) > 50
    assert all(own) == (scope == "prompt")


def within(run: list[int], text: list[int]) -> bool:
    return any(text[at : at + len(run)] == run for at in range(len(text) - len(run) + 1))


@needs_vllm
@slow
def test_sampled_texts_have_the_policys_law(trie: Any, small: Policy) -> None:
    """1,200 siblings each of two prompts draft for one another."""
    before = trie.counters.copy()
    checks = law(trie, small, TrieDrafter(TrieConfig(**EAGER)))
    assert all(check.passed for check in checks), checks
    assert sum(trie.counters.minus(before).accepted_at) > 100, "a draft that is never kept shows nothing"


@needs_vllm
@slow
def test_the_law_test_catches_the_trie_without_the_repair(
    trie: Any, small: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    without_repair(monkeypatch)
    assert not all(check.passed for check in law(trie, small, TrieDrafter(TrieConfig(**EAGER))))


@needs_vllm
@slow
def test_acceptance_is_that_of_the_local_engine(trie: Any, small: Policy) -> None:
    """Accepted drafts a decoding row on the same work: the second of two epochs of 16 prompts, 4 samples each.

    Not equal: random numbers differ, and the local engine drafts the first token too. Both vary from seed to seed by
    0.08 around 0.64, so the difference of two means of four by a twelfth: the bound is four times that.
    """
    prompts = [[i, i + 1, i + 2] for i in range(1, 17)]
    kept: dict[str, float] = {}
    for name in ("vllm", "local"):
        accepted = rows = 0
        for seed in range(4):
            empty(trie, TrieConfig(**EAGER))
            engine = trie if name == "vllm" else LocalEngine(small, TrieDrafter(TrieConfig(**EAGER)), k=K, slots=16)
            engine.generate(prompts, max_new_tokens=32, temperature=0.1, n=4, seed=2 * seed)
            before = engine.counters.copy()
            engine.generate(prompts, max_new_tokens=32, temperature=0.1, n=4, seed=2 * seed + 1)
            done = engine.counters.minus(before)
            prefills = 4 * len(prompts) if name == "vllm" else 0
            accepted, rows = accepted + sum(done.accepted_at), rows + done.rows - prefills
        kept[name] = accepted / rows
    assert kept["local"] > 0.4
    assert kept["vllm"] == pytest.approx(kept["local"], rel=0.35)


@needs_vllm
@slow
def test_weights_in_mid_stream_leave_the_corpus_alone(trie: Any, small: Policy) -> None:
    """The requests are preempted and computed again; their texts go on where they were."""
    other = changed(small, 0.3, seed=8)
    sampling = Sampling(40, 0.0, 0, ignore_eos=True)
    first = sorted(trie.stream(PROMPTS[:3], sampling), key=lambda r: r.prompt_index)
    rounds = 0

    def push() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 4:
            trie.load(version(2, other, TrieDrafter(TrieConfig(**EAGER))))

    again = sorted(trie.stream(PROMPTS[:3], sampling, between=push), key=lambda r: r.prompt_index)
    for old, new in zip(first, again, strict=True):
        kept = new.versions.count(0)
        assert 0 < kept < 40
        assert new.tokens[:kept] == old.tokens[:kept]
        begun = new.prompt_ids + new.tokens[:kept]
        rest = LocalEngine(other, slots=1).stream([begun], dataclasses.replace(sampling, max_new_tokens=40 - kept))
        assert new.tokens[kept:] == next(iter(rest)).tokens
    assert samples_of(corpus_of(trie)) == sorted(texts(first) + texts(again))


@needs_vllm
@slow
def test_a_full_corpus_stays_within_its_size_and_counts(trie: Any, small: Policy) -> None:
    empty(trie, TrieConfig(max_tokens=200, **EAGER))
    expected = texts(LocalEngine(small, slots=8).generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2))
    for _ in range(3):
        assert texts(trie.generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2)) == expected
    counts = trie.metrics()["drafter"]
    assert counts["tokens"] <= 200 < counts["evicted_tokens"]
    assert counts["evicted_texts"] > 0


@needs_vllm
@slow
def test_every_stream_is_an_epoch(trie: Any) -> None:
    """Of three streams a window of two forgets the first."""
    empty(trie, TrieConfig(window=2, **EAGER))
    for _ in range(3):
        trie.generate(PROMPTS, max_new_tokens=4, temperature=0.0, n=2)
    assert trie.metrics()["drafter"]["expired_texts"] == 2 * len(PROMPTS)
    assert trie.metrics()["drafter"]["texts"] == (1 + 2 * 2) * len(PROMPTS)


@needs_vllm
@slow
def test_an_engine_begins_with_the_corpus_of_its_drafter_and_tells_its_counts_when_closed(
    small: Policy, tmp_path: Path
) -> None:
    from forerun.engine.vllm.adapter import VllmEngine

    drafter = TrieDrafter(TrieConfig(**EAGER))
    expected = LocalEngine(small, drafter, k=K, slots=8).generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2)
    engine = make(small, drafter, BLOCK)
    ours = engine.generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2)
    assert texts(ours) == texts(expected)
    assert sum(r.rounds for r in ours) <= 1.05 * fewest(expected)
    counts = engine.metrics()["drafter"]
    assert counts["texts"] == len(PROMPTS) * (1 + 2 * 2)
    engine.close()
    assert engine.metrics()["drafter"] == counts
    with pytest.raises(UserError, match=r"corpus in .* cannot be read"):
        VllmEngine(small.name, engine.speculation.model_copy(update={"draft": str(tmp_path)}))
