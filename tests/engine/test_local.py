"""The local engine against Transformers, and speculative against plain, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.engine.base import Weights
from forerun.engine.local.engine import LocalEngine
from forerun.engine.staleness import Acceptance
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.training.weights import pack_weights
from tiny_models import random_drafter, random_head

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30] * 40]


def reference(policy: Policy, prompt: list[int], tokens: int) -> list[int]:
    """Greedy continuation by full forwards of the Transformers module, no cache at all."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            logits = policy.model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in policy.eos_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("fused", [True, False])
def test_plain_greedy_equals_transformers(tiny: Callable[..., Path], family: str, fused: bool) -> None:
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    rollouts = LocalEngine(policy, slots=3, fused=fused).generate(PROMPTS, max_new_tokens=20, temperature=0.0)
    assert [r.tokens for r in rollouts] == [reference(policy, p, 20) for p in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_speculative_greedy_equals_plain(tiny: Callable[..., Path], family: str, k: int) -> None:
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    plain = LocalEngine(policy, slots=4).generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    drafter = random_drafter(policy, vocabulary=list(range(0, 50, 2)))
    engine = LocalEngine(policy, drafter, k=k, slots=2)
    speculative = engine.generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    assert [r.tokens for r in speculative] == [r.tokens for r in plain]
    assert engine.metrics()["drafted"] > 0
    for a, b in zip(plain, speculative, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-5, rtol=0)


def test_logprobs_are_those_of_teacher_forcing(policy: Policy) -> None:
    engine = LocalEngine(policy, random_drafter(policy), k=3, slots=4)
    for temperature in (0.7, 1.3):
        for rollout in engine.generate(PROMPTS, max_new_tokens=16, temperature=temperature, n=2, seed=3):
            ids = torch.tensor([rollout.prompt_ids + rollout.tokens])
            with torch.no_grad():
                rows = torch.log_softmax(policy.model(ids).logits[0] / temperature, -1)
            at = torch.arange(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
            expected = rows[at, torch.tensor(rollout.tokens)]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=5e-5, rtol=0)


def test_results_do_not_depend_on_batching(policy: Policy) -> None:
    """Refill order, slots and neighbours must not matter: every draw is keyed by its request and position."""
    runs = [
        LocalEngine(policy, random_drafter(policy), k=3, slots=slots).generate(PROMPTS, max_new_tokens=20, n=3, seed=11)
        for slots in (1, 4, 15)
    ]
    for other in runs[1:]:
        assert [r.tokens for r in other] == [r.tokens for r in runs[0]]
    samples = runs[0]
    assert [(r.prompt_index, r.sample_index) for r in samples] == [(p, s) for p in range(5) for s in range(3)]
    assert samples[0].tokens != samples[1].tokens


def test_a_drafter_that_is_always_right_is_always_accepted(policy: Policy) -> None:
    """The policy's own argmax as a draft: greedy verification must accept every slot, so alpha is k + 1."""

    class Oracle(Eagle3Drafter):
        def propose(self, rows, budget):  # type: ignore[no-untyped-def]
            from forerun.types import Draft

            k = int(budget.max())
            tokens = torch.zeros(rows.count, k, dtype=torch.int64)
            for b in range(rows.count):
                known = truth[int(rows.seeds[b])]
                start = int(rows.lengths[b]) + 1
                future = known[start : start + k]
                tokens[b, : len(future)] = torch.tensor(future)
            return Draft(tokens, budget)

    from forerun.engine.local.scheduler import request_seed

    plain = LocalEngine(policy, slots=4).generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    truth = {request_seed(0, r.prompt_index, 0): r.prompt_ids + r.tokens for r in plain}
    engine = LocalEngine(policy, Oracle(random_head(policy), policy), k=3, slots=4)
    result = engine.generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    assert [r.tokens for r in result] == [r.tokens for r in plain]
    assert engine.metrics()["acceptance_per_position"][0] == pytest.approx(1.0)
    full = [r for r in result if r.finish_reason == "length"]
    assert full and all(r.rounds == 6 for r in full)  # 24 tokens in rounds of 4


def test_every_way_to_end(policy: Policy) -> None:
    engine = LocalEngine(policy, random_drafter(policy), k=3, slots=8)
    rollouts = engine.generate(PROMPTS, max_new_tokens=200, n=4, seed=5)
    reasons = {r.finish_reason for r in rollouts}
    assert reasons == {"eos", "context"}
    for r in rollouts:
        total = len(r.prompt_ids) + len(r.tokens)
        assert (r.tokens[-1] == 0) == (r.finish_reason == "eos") and 0 not in r.tokens[:-1]
        assert total == policy.context if r.finish_reason == "context" else total < policy.context
        assert len(r.tokens) == len(r.logprobs) == len(r.versions) == len(r.drafted)
    assert {r.finish_reason for r in engine.generate(PROMPTS, max_new_tokens=2, n=4)} <= {"eos", "length"}


def test_stop_strings_end_inside_an_accepted_run(policy: Policy) -> None:
    stop = ("7", "ab")
    drafter = random_drafter(policy)
    for engine in (LocalEngine(policy, slots=4), LocalEngine(policy, drafter, k=7, slots=4)):
        rollouts = engine.generate(PROMPTS, max_new_tokens=60, n=6, seed=2, stop=stop)
        stopped = [r for r in rollouts if r.finish_reason == "stop"]
        assert stopped
        for r in rollouts:
            text = policy.tokenizer.decode(r.tokens)
            found = any(s in text for s in stop)
            assert found == (r.finish_reason == "stop")
            assert not any(s in policy.tokenizer.decode(r.tokens[:-1]) for s in stop)


def test_texts_and_ids_are_both_prompts(policy: Policy) -> None:
    engine = LocalEngine(policy, slots=2)
    by_text, by_ids = (
        engine.generate(["12+3="], max_new_tokens=4),
        engine.generate([policy.tokenizer("12+3=")["input_ids"]], max_new_tokens=4),
    )
    assert by_text[0].prompt_ids == by_ids[0].prompt_ids and by_text[0].tokens == by_ids[0].tokens


def test_speculation_off_runs_no_drafter(policy: Policy) -> None:
    engine = LocalEngine(policy, slots=4)
    engine.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
    metrics = engine.metrics()
    assert metrics["drafted"] == metrics["rounds"] == 0 and metrics["acceptance_length"] is None
    with pytest.raises(UserError, match="give both, or neither"):
        LocalEngine(policy, None, k=3)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [([[]], "empty"), ([[1, 2], [3] * 128], "128 tokens"), ([[1, 999]], "outside"), ([], "Nothing to generate")],
)
def test_bad_prompts_are_refused(policy: Policy, prompts: list[list[int]], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LocalEngine(policy, slots=2).generate(prompts, max_new_tokens=4)


def test_weights_must_arrive_whole(policy: Policy) -> None:
    drafter = random_drafter(policy)
    engine = LocalEngine(policy, drafter, k=2, slots=2)
    good = pack_weights(3, policy, drafter)
    assert engine.load(good).version == 3 and engine.generate([[1, 2]], max_new_tokens=3)[0].versions[0] == 3
    with pytest.raises(UserError, match="no drafter"):
        engine.load(pack_weights(4, policy, None))
    with pytest.raises(UserError, match="partial or stale"):
        engine.load(Weights(4, {**good.checksums, "draft": "0" * 16}))
    state = {k: v.clone() for k, v in drafter.state_dict().items()}
    missing = {k: v for k, v in state.items() if k != "fc.weight"}
    with pytest.raises(UserError, match=r"missing \['fc.weight'\]"):
        engine.load(Weights(4, good.checksums, draft=missing))
    stale = dict(state, **{"fc.weight": state["fc.weight"] + 1})
    with pytest.raises(UserError, match="draft weights of version 4"):
        engine.load(Weights(4, good.checksums, draft=stale))
    with pytest.raises(UserError, match="a drafter, but this engine"):
        LocalEngine(policy, slots=2).load(good)


def test_a_collapsed_drafter_is_an_alarm(policy: Policy) -> None:
    """A drafter whose weights went wrong still gives exact rollouts, so only acceptance can tell."""
    head = random_head(policy, seed=1)
    drafter = Eagle3Drafter(head, policy)
    engine = LocalEngine(policy, drafter, k=2, slots=8)
    good = {k: v.clone() for k, v in drafter.state_dict().items()}
    engine._detector.known.append(Acceptance(96, 32, 1.5))  # what a trained drafter had reached before the load
    engine.load(pack_weights(1, policy, drafter))
    engine.generate(PROMPTS, max_new_tokens=30, n=4)
    assert len(engine.warnings) == 1 and "collapsed" in engine.warnings[0]
    engine.load(Weights(2, pack_weights(2, policy, drafter).checksums, draft=good))
    engine.generate(PROMPTS, max_new_tokens=30, n=4)
    assert len(engine.warnings) == 1  # no worse than before: no second alarm


def test_training_in_place_is_seen_at_once(tiny: Callable[..., Path]) -> None:
    """The fused forward reads views of the module's parameters: an update of the module is an update of the engine."""
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    engine = LocalEngine(policy, slots=2)
    before = engine.generate([[4, 5, 6]], max_new_tokens=12, temperature=0.0)[0].tokens
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    after = engine.generate([[4, 5, 6]], max_new_tokens=12, temperature=0.0)[0].tokens
    assert after == reference(policy, [4, 5, 6], 12) != before
    policy.model.model.layers[0].self_attn.q_proj.weight.data = torch.randn(48, 48)  # replaced, not updated
    assert engine.generate([[4, 5, 6]], max_new_tokens=12, temperature=0.0)[0].tokens == reference(
        policy, [4, 5, 6], 12
    )


def test_a_paused_engine_starts_no_round(policy: Policy) -> None:
    engine = LocalEngine(policy, slots=2)
    expected = engine.generate(PROMPTS, max_new_tokens=6, seed=4)
    engine.pause()
    with pytest.raises(UserError, match=r"paused; call resume\(\)"):
        engine.generate(PROMPTS, max_new_tokens=6, seed=4)
    engine.resume()
    assert [r.tokens for r in engine.generate(PROMPTS, max_new_tokens=6, seed=4)] == [r.tokens for r in expected]
