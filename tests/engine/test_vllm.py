"""The vLLM engine against the local engine: same contract, same texts. Skipped where vLLM is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from forerun.acceptance.truncate import Truncation
from forerun.config import NgramConfig
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.drafters.ngram import NgramDrafter
from forerun.engine.base import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.lossless.distribution import distribution_checks
from forerun.models import Policy
from vllm_tiny import PROMPTS, TOLERANCE, law, make, needs_vllm, texts, version

pytestmark = [needs_vllm, pytest.mark.slow]


def test_greedy_texts_and_rounds_are_the_local_engines(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    """vLLM's first token comes from the prefill: the local engine, given it too, runs the very same rounds."""
    local = LocalEngine(small, drafter, k=3, slots=8)
    before = fresh.counters.copy()
    ours = fresh.generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    theirs = local.generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    assert texts(ours) == texts(theirs)
    assert [r.finish_reason for r in ours] == [r.finish_reason for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=TOLERANCE, rtol=0)
    begun = [r for r in ours if len(r.tokens) > 1]
    aligned = local.generate([r.prompt_ids + r.tokens[:1] for r in begun], max_new_tokens=23, temperature=0.0)
    assert [r.rounds for r in aligned] == [r.rounds - 1 for r in begun]
    assert [r.drafted[:-1] for r in aligned] == [r.drafted[1:-1] for r in begun]  # vLLM drafts the last token too
    done = fresh.counters.minus(before)
    assert done.tokens == sum(len(r.tokens) for r in ours)
    assert sum(done.accepted_at) == sum(sum(r.drafted) for r in ours) > 0
    assert done.rows == sum(r.rounds for r in ours)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_teacher_forcing(fresh: Any, small: Policy, temperature: float) -> None:
    for rollout in fresh.generate(PROMPTS, max_new_tokens=16, temperature=temperature, n=2, seed=3):
        ids = torch.tensor([rollout.prompt_ids + rollout.tokens])
        with torch.no_grad():
            rows = small.model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(rows / temperature, -1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=TOLERANCE, rtol=0)


def test_sampled_texts_have_the_policys_law(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    checks = law(fresh, small, drafter)
    assert all(check.passed for check in checks), checks


def test_a_paused_engine_starts_no_round(fresh: Any) -> None:
    fresh.pause()
    with pytest.raises(UserError, match="paused"):
        fresh.generate([[5]])
    fresh.resume()
    assert len(fresh.generate([[5]], max_new_tokens=3)) == 1


def test_samples_that_are_added_to_a_stream_are_those_of_one_that_had_them(fresh: Any) -> None:
    sampling = Sampling(12, 0.0, 0, ignore_eos=True)
    later = [(1, 1), (0, 1), (1, 0)]
    stream = fresh.stream(PROMPTS[:2], sampling, 2, [(0, 0)], lambda: later and fresh.extend([later.pop()]))
    found = {(r.prompt_index, r.sample_index): r.tokens for r in stream}
    whole = fresh.stream(PROMPTS[:2], sampling, 2)
    assert found == {(r.prompt_index, r.sample_index): r.tokens for r in whole} and len(found) == 4


def test_ends_are_those_of_the_local_engine(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    local = LocalEngine(small, drafter, k=3, slots=8)
    long = [[7] * (small.context - 9)]
    for prompts, options in ((PROMPTS, {"stop": ("a", "7")}), (long, {}), (PROMPTS, {"max_new_tokens": 1})):
        limits = {"max_new_tokens": 40, **options}
        ours, theirs = (e.generate(prompts, temperature=0.0, **limits) for e in (fresh, local))
        assert texts(ours) == texts(theirs)
        assert [r.finish_reason for r in ours] == [r.finish_reason for r in theirs]
    free = Sampling(20, 0.0, 0, ignore_eos=True)
    ours, theirs = (sorted(e.stream(PROMPTS, free), key=lambda r: r.prompt_index) for e in (fresh, local))
    assert texts(ours) == texts(theirs)
    assert {len(r.tokens) for r in ours} == {20}


def test_a_sample_at_the_contexts_end_does_not_stop_the_others_drafts(small: Policy, drafter: Eagle3Drafter) -> None:
    """vLLM drafts for no row while one sequence has no room for k drafts: the engine keeps room beyond its context."""
    engine = make(small, drafter, {"method": "eagle3", "draft": "given", "k": 3}, context=64)
    prompts = [[5, 6, 7], [20, 21], [7] * 60]
    ours = sorted(engine.stream(prompts, Sampling(30, 0.0, 0, ignore_eos=True)), key=lambda r: r.prompt_index)
    assert [(len(r.tokens), r.finish_reason) for r in ours] == [(30, "length"), (30, "length"), (4, "context")]
    assert engine.counters.rounds == engine.counters.rows - len(prompts)  # all but the prefills
    engine.close()


def test_a_seed_gives_the_same_samples_and_leaves_the_callers_random_state(fresh: Any) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two, other = (fresh.generate(PROMPTS, max_new_tokens=12, n=2, seed=s) for s in (4, 4, 5))
    assert texts(one) == texts(two) != texts(other)
    assert torch.equal(state, torch.get_rng_state())
    assert [(r.prompt_index, r.sample_index) for r in one] == [(p, s) for p in range(len(PROMPTS)) for s in (0, 1)]


def test_mistakes_are_errors(fresh: Any, small: Policy) -> None:
    for prompts, options, reason in (
        ([[]], {}, "is empty"),
        ([[10**6]], {}, "token id outside"),
        ([[1] * small.context], {}, "shorten it"),
        ([[1]], {"n": 0}, "Nothing to generate"),
        ([[1]], {"temperature": 0.001}, "vLLM samples at 0"),
        ([list(range(9))] * 2 + [[]], {}, "Prompt 2 is empty"),
    ):
        with pytest.raises(UserError, match=reason):
            fresh.generate(prompts, **options)
    with pytest.raises(UserError, match="whole distribution"):
        next(fresh.stream([[5]], Sampling(4, 1.0, 0, truncation=Truncation(top_k=2))))
    stream = fresh.stream([[5], [6]], Sampling(4, 1.0, 0))
    next(stream)
    with pytest.raises(UserError, match="already generating"):
        fresh.generate([[5]])
    stream.close()
    assert len(fresh.generate([[5]], max_new_tokens=3)) == 1


def test_a_draft_temperature_scales_q_and_keeps_the_law(small: Policy, drafter: Eagle3Drafter) -> None:
    """Through the files at the start and through a load."""
    cold = make(small, drafter, {"method": "eagle3", "draft": "given", "k": 3, "draft_temperature": 0.25})
    for number in (0, 1):
        head = cold._vllm.collective_rpc(lambda worker: worker.model_runner.drafter.model)[0]
        states = torch.randn(4, small.model.config.hidden_size, generator=torch.Generator().manual_seed(number))
        ours = drafter.head.lm_head(states).detach() / 0.25
        torch.testing.assert_close(head.compute_logits(states)[:, drafter.vocabulary], ours, rtol=1e-4, atol=1e-3)
        cold.load(version(number + 1, small, drafter))
    checks = distribution_checks(cold, small, drafter, [[5, 6, 7]], 600, 5, Sampling(5, 1.0, 12))
    assert all(check.passed for check in checks), checks
    cold.close()


def test_ngram_and_plain_texts_are_the_policys(small: Policy) -> None:
    """Two engines at a time, and one of them after the other was closed."""
    lookup = {"prompt_lookup_max": 2, "prompt_lookup_min": 1}
    looker = NgramDrafter(NgramConfig(**lookup))
    ngram = make(small, looker, {"method": "ngram", "k": 3, "ngram": lookup})
    plain = make(small, None, None)
    expected = texts(LocalEngine(small, slots=8).generate(PROMPTS, max_new_tokens=24, temperature=0.0))
    for engine, drafter in ((plain, None), (ngram, looker)):
        assert texts(engine.generate(PROMPTS, max_new_tokens=24, temperature=0.0)) == expected
        engine.load(version(3, small, drafter))
        assert texts(engine.generate(PROMPTS, max_new_tokens=24, temperature=0.0)) == expected
        engine.close()
    assert ngram.metrics()["drafted"] > 0
    assert plain.metrics()["rounds"] == 0


def test_drafts_may_be_shorter_in_a_crowd(small: Policy) -> None:
    """What vLLM is handed on under `speculation.vllm`: three drafts for one or two samples, one for more."""
    lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    block = {
        "method": "ngram", "k": 3, "ngram": lookup,
        "vllm": {"num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 8, 1]]},
    }  # fmt: skip
    engine = make(small, NgramDrafter(NgramConfig(**lookup)), block)
    drafted = []
    for prompts in (PROMPTS[:1], PROMPTS):
        before = engine.counters.copy()
        found = engine.generate(prompts, max_new_tokens=24, temperature=0.0)
        assert texts(found) == texts(LocalEngine(small, slots=8).generate(prompts, max_new_tokens=24, temperature=0.0))
        drafted.append(engine.counters.minus(before).drafted_at)
    engine.close()
    assert drafted[0][2] > 0 and drafted[1][0] > drafted[1][2]
