"""Versions into the vLLM engine: what arrives speaks, what is wrong is refused, what does not take is noticed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from forerun.drafters.draft_model import ModelDrafter
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.engine.base import Sampling, Weights
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.models.checksum import checksum
from vllm_tiny import PROMPTS, TOLERANCE, changed, frequent, head_for, make, needs_vllm, resident, texts, version

pytestmark = [needs_vllm, pytest.mark.slow]


def drafted_at(engine: Any, prompts: list[list[int]]) -> list[list[bool]]:
    """Which tokens of long greedy texts were drafted, from the second on: vLLM's first comes from the prefill."""
    begun = isinstance(engine, LocalEngine)
    if begun:
        first = engine.generate(prompts, max_new_tokens=1, temperature=0.0)
        prompts = [r.prompt_ids + r.tokens for r in first]
    long = Sampling(60 - begun, 0.0, 0, ignore_eos=True)
    rollouts = sorted(engine.stream(prompts, long), key=lambda r: r.prompt_index)
    found = [(r.drafted if begun else r.drafted[1:])[:-1] for r in rollouts]  # vLLM drafts the last token too
    assert sum(sum(flags) for flags in found) >= 5, "a drafter that is never right shows nothing"
    return found


def test_pushed_weights_speak(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    first = texts(fresh.generate(PROMPTS, max_new_tokens=16, temperature=0.0))
    other = changed(small, 0.3, seed=5)
    head = head_for(other, frequent(other), seed=9)
    sent = version(4, other, head)
    held = fresh.load(sent)
    assert (held.version, fresh.metrics()["version"]) == (4, 4)
    local = LocalEngine(other, head, k=3, slots=8)
    ours = fresh.generate(PROMPTS, max_new_tokens=16, temperature=0.0)
    assert texts(ours) == texts(local.generate(PROMPTS, max_new_tokens=16, temperature=0.0)) != first
    assert all(r.versions == [4] * len(r.tokens) for r in ours)
    assert drafted_at(fresh, PROMPTS) == drafted_at(local, PROMPTS)  # the drafter's weights arrived too
    for state in sent.groups.values():
        for tensor in state.values():
            tensor.zero_()  # the sender goes on: vLLM keeps none of its tensors
    assert texts(fresh.generate(PROMPTS, max_new_tokens=16, temperature=0.0)) == texts(ours)


def test_a_wrong_version_is_refused_and_changes_nothing(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    before = texts(fresh.generate(PROMPTS, max_new_tokens=12, temperature=0.0))
    other = changed(small, 0.3, seed=6)
    right = version(7, other, drafter)
    assert right.policy is not None and right.draft is not None
    damaged = {**right.policy, "model.norm.weight": right.policy["model.norm.weight"] + 1}
    partial = {n: t for n, t in right.draft.items() if n != "fc.weight"}
    for wrong, reason in (
        (dataclasses.replace(right, checksums={"policy": right.checksums["policy"]}, draft=None), "no drafter"),
        (dataclasses.replace(right, draft=None, checksums={**right.checksums, "draft": "0" * 16}), "must carry"),
        (dataclasses.replace(right, policy=None), "must carry"),
        (dataclasses.replace(right, policy=damaged), "arrived"),
        (dataclasses.replace(right, draft=partial), "missing .'fc.weight'"),
        (dataclasses.replace(right, checksums={"draft": right.checksums["draft"]}, policy=None), "no policy"),
    ):
        with pytest.raises(UserError, match=reason):
            fresh.load(wrong)
    assert fresh.metrics()["version"] == 0
    assert texts(fresh.generate(PROMPTS, max_new_tokens=12, temperature=0.0)) == before


@pytest.mark.parametrize("group", ["policy", "draft"])
def test_a_load_that_does_not_take_is_noticed(
    fresh: Any, small: Policy, drafter: Eagle3Drafter, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is made to ignore a group; what it holds afterwards is compared with what was sent."""
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

    other = changed(small, 0.3, seed=6)
    deaf = {"policy": LlamaForCausalLM, "draft": Eagle3LlamaForCausalLM}[group]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="it holds another"):
        patch.setattr(deaf, "load_weights", lambda self, weights: None)
        fresh.load(version(3, other, head_for(other, frequent(other), seed=9)))
    with pytest.raises(UserError, match="neither the old nor the new"):
        fresh.generate([[5]])
    fresh.load(version(4, other, drafter))
    assert texts(fresh.generate(PROMPTS, max_new_tokens=12, temperature=0.0)) == texts(
        LocalEngine(other, slots=8).generate(PROMPTS, max_new_tokens=12, temperature=0.0)
    )


def test_weights_pushed_in_mid_stream_take_over(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    """A prompt near the context's end is done first. The others go on as the new policy would, after what is there."""
    other = changed(small, 0.3, seed=8)
    prompts, sampling = [[5, 6, 7], [20, 21], [7] * (small.context - 6)], Sampling(40, 0.0, 0, ignore_eos=True)
    old = sorted(LocalEngine(small, slots=4).stream(prompts, sampling), key=lambda r: r.prompt_index)
    stream = fresh.stream(prompts, sampling)
    short = next(stream)
    assert (short.prompt_index, short.finish_reason) == (2, "context")
    fresh.load(version(2, other, drafter))
    rest = sorted(stream, key=lambda r: r.prompt_index)
    for rollout in rest:
        kept = rollout.versions.count(0)
        assert rollout.versions == [0] * kept + [2] * (40 - kept)
        assert 0 < kept < 40
        assert rollout.tokens[:kept] == old[rollout.prompt_index].tokens[:kept]
        begun = rollout.prompt_ids + rollout.tokens[:kept]
        new = list(LocalEngine(other, slots=1).stream([begun], dataclasses.replace(sampling, max_new_tokens=40 - kept)))
        assert rollout.tokens[kept:] == new[0].tokens
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs[kept:]), torch.tensor(new[0].logprobs), atol=TOLERANCE, rtol=0
        )


def test_fifty_versions_leave_no_copy_behind(
    fresh: Any,
    small: Policy,
    drafter: Eagle3Drafter,
    record_property: Callable[[str, object], None],
) -> None:
    """A copy that stayed behind at every load would be 45 versions; what the allocator keeps is a few at most."""
    first, seconds, marks = version(0, small, drafter), [], []
    assert first.policy is not None and first.draft is not None
    for number in range(1, 51):
        policy = {**first.policy, "model.norm.weight": first.policy["model.norm.weight"] + number / 1000}
        draft = {**first.draft, "norm.weight": first.draft["norm.weight"] + number / 1000}
        sums = {"policy": checksum(policy), "draft": checksum(draft)}
        started = time.perf_counter()
        held = fresh.load(Weights(number, sums, policy, draft))
        seconds.append(time.perf_counter() - started)
        assert (held.version, held.checksums) == (number, sums)
        marks.append(resident())
    size = sum(t.numel() * t.element_size() for state in (first.policy, first.draft) for t in state.values())
    record_property("seconds_per_load", statistics.median(seconds))
    record_property("bytes_more", marks[-1] - marks[4])
    assert marks[-1] - marks[4] < 5 * size, f"{marks[-1] - marks[4]} bytes more after 45 versions of {size}"
    last = load_policy(small.name, "float32", "cpu")
    last.model.load_state_dict(policy)
    expected = LocalEngine(last, slots=8).generate(PROMPTS, max_new_tokens=12, temperature=0.0)
    assert texts(fresh.generate(PROMPTS, max_new_tokens=12, temperature=0.0)) == texts(expected)


def test_a_draft_model_that_goes_stale_is_reported(small: Policy) -> None:
    """The policy drafts for itself: all is accepted, until its copy is replaced by another."""
    own = load_policy(small.name, "float32", "cpu")
    engine = make(small, ModelDrafter(own, small), {"method": "model", "draft": "given", "k": 3, "verify": "token"})
    sampling = Sampling(40, 1.0, 2, ignore_eos=True)
    list(engine.stream(PROMPTS, sampling, 4))
    assert engine.metrics()["acceptance_length"] == pytest.approx(3.9)  # 1 + 9 * 4 + 3 tokens
    assert not engine.metrics()["warnings"]
    stale = ModelDrafter(changed(small, 2.0, seed=3), small)
    engine.load(version(1, small, stale))
    list(engine.stream(PROMPTS, sampling, 4))
    assert any("collapsed" in w for w in engine.metrics()["warnings"])
    before = engine.counters.copy()
    engine.load(version(2, small, ModelDrafter(own, small)))
    list(engine.stream(PROMPTS, sampling, 4))
    assert engine.counters.minus(before).acceptance_length == pytest.approx(3.9)
    engine.close()
