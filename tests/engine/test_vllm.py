"""The vLLM engine against the local engine: same contract, same texts, same weights.

Skipped where vLLM is not installed (docs/vllm.md). The policy is a tiny random Llama whose heads are wide enough for
vLLM's CPU kernels; its EAGLE-3 head is untrained, which losslessness must survive.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forerun.config import NgramConfig, SpeculationConfig
from forerun.draft.eagle3 import Eagle3Config, Eagle3Drafter, Eagle3Head
from forerun.draft.model import ModelDrafter
from forerun.draft.ngram import NgramDrafter
from forerun.engine.base import Counters, Sampling, Weights
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.schedule import Sequence
from forerun.engine.vllm.accounting import Live
from forerun.engine.vllm.settings import translate
from forerun.engine.vllm.transfer import Staging, chunks, shapes
from forerun.errors import UserError
from forerun.lossless.law import law_checks
from forerun.models import Policy, load_policy
from forerun.models.checksum import checksum
from forerun.verify.truncate import Truncation
from tiny_models import save_tiny

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; docs/vllm.md says how"
)
slow = pytest.mark.slow
PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30] * 40]
SHAPE = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 128}
TOLERANCE = 2e-4


def head_for(policy: Policy, vocabulary: list[int], seed: int = 0) -> Eagle3Drafter:
    """An untrained head with heads of 32."""
    target = policy.model.config
    torch.manual_seed(seed)
    config = Eagle3Config(
        hidden_size=target.hidden_size, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=target.vocab_size, draft_vocab_size=len(vocabulary), layers=(0, 1, 3),
    )  # fmt: skip
    head = Eagle3Head(config)
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    head.set_vocabulary(torch.tensor(vocabulary))
    return Eagle3Drafter(head, policy)


def version(number: int, policy: Policy, drafter: Any = None) -> Weights:
    """The live weights as a version with tensors."""
    state = {n: t.clone() for n, t in policy.model.state_dict().items()}
    sums = {"policy": checksum(state)}
    if drafter is None:
        return Weights(number, sums, state)
    draft = {n: t.clone() for n, t in drafter.state_dict().items()}
    return Weights(number, {**sums, "draft": checksum(draft)}, state, draft)


def changed(policy: Policy, scale: float, seed: int) -> Policy:
    """The policy with noise on every matrix."""
    other = load_policy(policy.name, "float32", "cpu")
    torch.manual_seed(seed)
    for parameter in other.model.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=scale * float(parameter.detach().std()))
    return other


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(str(save_tiny(tmp_path_factory.mktemp("vllm") / "policy", **SHAPE)), "float32", "cpu")


def frequent(policy: Policy) -> list[int]:
    """Six tokens that its greedy texts are full of: with them an untrained head is right at times."""
    long = Sampling(60, 0.0, 0, ignore_eos=True)
    counts = Counter(token for r in LocalEngine(policy, slots=8).stream(PROMPTS, long) for token in r.tokens)
    return sorted(token for token, _ in counts.most_common(6))


@pytest.fixture(scope="module")
def drafter(small: Policy) -> Eagle3Drafter:
    return head_for(small, frequent(small))


def make(policy: Policy, drafter: Any, block: dict[str, Any] | None, **limits: Any) -> Any:
    from forerun.engine.vllm.engine import Limits, VllmEngine

    settings = None if block is None else SpeculationConfig.model_validate(block)
    sizes = {"slots": 8, "cache_gib": 0.02, "chunk_bytes": 2**20, **limits}
    return VllmEngine.around(policy, drafter, settings, limits=Limits(**sizes))


@pytest.fixture(scope="module")
def engine(small: Policy, drafter: Eagle3Drafter) -> Iterator[Any]:
    made = make(small, drafter, {"method": "eagle3", "draft": "given", "k": 3})
    yield made
    made.close()


@pytest.fixture
def fresh(engine: Any, small: Policy, drafter: Eagle3Drafter) -> Any:
    """The engine with the first weights, whatever a test before it did."""
    engine.load(version(0, small, drafter))
    return engine


def texts(rollouts: Any) -> list[list[int]]:
    return [r.tokens for r in rollouts]


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


# ---- without vLLM ----


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"method": "mtp"}, "prediction heads only inside checkpoints"),
        ({"method": "trie"}, "samples of the same prompt"),
        ({"method": "graft", "draft": "x"}, "draft trees"),
        ({"method": "eagle3", "draft": "x", "draft_temperature": "auto"}, "temperature of the rollouts"),
        ({"method": "model", "draft": "x", "draft_temperature": 0.8}, "temperature of the rollouts"),
        ({"method": "eagle3"}, "needs speculation.draft"),
    ],
)
def test_what_vllm_lacks_is_refused_with_the_reason(block: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        translate(SpeculationConfig.model_validate(block), Path("x"), block=True)


def test_translation() -> None:
    def of(block: bool, **fields: Any) -> Any:
        return translate(SpeculationConfig.model_validate(fields), Path("folder"), block)

    assert of(True, method="none").config is None
    sampled = of(True, method="eagle3", draft="x", k=5)
    assert sampled.config == {
        "method": "eagle3", "model": "folder", "num_speculative_tokens": 5,
        "draft_sample_method": "probabilistic", "rejection_sample_method": "block",
    }  # fmt: skip
    old = of(False, method="model", draft="x", k=2)
    assert (old.config["method"], old.config["rejection_sample_method"], old.rule) == (
        "draft_model",
        "standard",
        "token",
    )
    assert "token rejection" in old.notes[0]
    assert not of(False, method="model", draft="x", proposal="argmax").notes
    ngram = of(False, method="ngram", k=4, ngram={"prompt_lookup_max": 3, "prompt_lookup_min": 2})
    assert ngram.config == {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2,
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_pieces_come_together_again(size: int) -> None:
    torch.manual_seed(0)
    groups = {
        "policy": {"a": torch.randn(5, 7), "b": torch.randn(3).to(torch.bfloat16)},
        "draft": {"d2t": torch.arange(9), "t2d": torch.tensor([True, False])},
    }
    staging = Staging.of({g: shapes(s) for g, s in groups.items()})
    sent = list(chunks(groups, size))
    for pieces in sent:
        assert sum(p.values.numel() * p.values.element_size() for p in pieces) <= max(size, 8)
        staging.add(pieces)
    assert staging.checksums() == {g: checksum(s) for g, s in groups.items()}
    short = Staging.of({g: shapes(s) for g, s in groups.items()})
    for pieces in sent[:-1]:
        short.add(pieces)
    with pytest.raises(UserError, match="elements missing"):
        short.checksums()


def test_tokens_behind_the_end_are_taken_back() -> None:
    """Rounds of 4 drafts: 1 plain token, then 3 kept + 1; then 4 kept, of which the end leaves 2."""

    class Spec:
        per_step_accepted = (3, 4)

    class Entry:
        logprob = -1.0

    counters = Counters(rounds=2, round_tokens=4 + 5, drafted=8, accepted_at=[2, 2, 2, 1], drafted_at=[2, 2, 2, 2])
    live = Live(Sequence([1], 0, 0, 0))
    for tokens in ([5], [6, 7, 8, 9], [10, 11]):
        live.add(tokens, [{t: Entry()} for t in tokens], 3)
    live.settle(Spec(), counters)
    assert live.sequence.drafted == [False, True, True, True, False, True, True]
    assert (counters.round_tokens, counters.accepted_at) == (4 + 2, [2, 2, 1, 0])


def test_tokens_behind_a_stop_string_are_taken_back() -> None:
    class Entry:
        logprob = -1.0

    counters = Counters(rounds=1, round_tokens=4, drafted=3, accepted_at=[1, 1, 1], drafted_at=[1, 1, 1])
    live = Live(Sequence([1], 0, 0, 0))
    live.add([6, 7, 8, 9], [{t: Entry()} for t in (6, 7, 8, 9)], 0)
    live.cut(2)
    live.settle(None, counters)
    assert (live.sequence.tokens, live.sequence.drafted) == ([6, 7], [True, True])
    assert (counters.round_tokens, counters.accepted_at) == (2, [1, 1, 0])


# ---- with vLLM ----


@needs_vllm
@slow
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


@needs_vllm
@slow
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_teacher_forcing(fresh: Any, small: Policy, temperature: float) -> None:
    for rollout in fresh.generate(PROMPTS, max_new_tokens=16, temperature=temperature, n=2, seed=3):
        ids = torch.tensor([rollout.prompt_ids + rollout.tokens])
        with torch.no_grad():
            rows = small.model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(rows / temperature, -1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=TOLERANCE, rtol=0)


LAW = {"contexts": [[5, 6, 7], [20, 21]], "samples": 1200, "length": 5}


def law(engine: Any, policy: Policy, drafter: Any) -> list[Any]:
    return law_checks(engine, policy, drafter, **LAW, sampling=Sampling(5, 1.0, 11))


@needs_vllm
@slow
def test_sampled_texts_have_the_policys_law(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    checks = law(fresh, small, drafter)
    assert all(check.passed for check in checks), checks


@needs_vllm
@slow
def test_the_law_test_catches_the_kernel_without_its_repair(
    fresh: Any, small: Policy, drafter: Eagle3Drafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils import cpu_triton_utils

    from forerun.engine.vllm import engine as module
    from forerun.engine.vllm.repair import KERNEL

    register_kernels({KERNEL: cpu_triton_utils._expand_kernel_impl})
    monkeypatch.setattr(module, "ensure_exact", lambda cpu: False)
    assert not all(check.passed for check in law(fresh, small, drafter))


@needs_vllm
def test_vllm_still_needs_the_repair() -> None:
    """Fails when vLLM has mended its kernel: engine/vllm/repair.py can go."""
    from vllm.utils import cpu_triton_utils

    from forerun.engine.vllm.repair import expand, works

    assert works(expand)
    assert not works(cpu_triton_utils._expand_kernel_impl)


@needs_vllm
def test_vllms_scan_for_kernels_still_fails_beside_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when vLLM has mended it: `let_scan_pass` can go."""
    pytest.importorskip("llvmlite.binding")
    from vllm.triton_utils import dispatcher

    from forerun.engine.vllm.repair import let_scan_pass

    monkeypatch.delattr(dispatcher, "vars", raising=False)
    with pytest.raises(AttributeError):
        dispatcher._rebind_kernels([])
    let_scan_pass()
    dispatcher._rebind_kernels([])


@needs_vllm
def test_a_broken_kernel_of_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.v1.sample import rejection_sampler

    from forerun.engine.vllm.repair import ensure_exact

    monkeypatch.setattr(rejection_sampler, "_expand", lambda *_: None)
    monkeypatch.setattr(vllm, "__version__", "9.9.9")
    with pytest.raises(UserError, match="wrong temperature"):
        ensure_exact(True)


@needs_vllm
@slow
def test_pushed_weights_speak(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    first = texts(fresh.generate(PROMPTS, max_new_tokens=16, temperature=0.0))
    other = changed(small, 0.3, seed=5)
    head = head_for(other, frequent(other), seed=9)
    held = fresh.load(version(4, other, head))
    assert (held.version, fresh.metrics()["version"]) == (4, 4)
    local = LocalEngine(other, head, k=3, slots=8)
    ours = fresh.generate(PROMPTS, max_new_tokens=16, temperature=0.0)
    assert texts(ours) == texts(local.generate(PROMPTS, max_new_tokens=16, temperature=0.0)) != first
    assert all(r.versions == [4] * len(r.tokens) for r in ours)
    assert drafted_at(fresh, PROMPTS) == drafted_at(local, PROMPTS)  # the drafter's weights arrived too


@needs_vllm
@slow
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


@needs_vllm
@slow
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


@needs_vllm
@slow
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


@needs_vllm
@slow
def test_a_paused_engine_starts_no_round(fresh: Any) -> None:
    fresh.pause()
    with pytest.raises(UserError, match="paused"):
        fresh.generate([[5]])
    fresh.resume()
    assert len(fresh.generate([[5]], max_new_tokens=3)) == 1


@needs_vllm
@slow
def test_ten_versions_in_pieces_leave_no_copy_behind(fresh: Any, small: Policy, drafter: Eagle3Drafter) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    state = version(1, small, drafter)
    for number in range(1, 4):
        fresh.load(dataclasses.replace(state, version=number))
    start = resident()
    for number in range(4, 14):
        fresh.load(dataclasses.replace(state, version=number))
    assert state.policy is not None
    size = sum(t.numel() * t.element_size() for t in state.policy.values())
    assert fresh.metrics()["version"] == 13
    assert resident() - start < 5 * size, f"{resident() - start} bytes more after 10 versions of {size}"


@needs_vllm
@slow
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


@needs_vllm
@slow
def test_a_sample_at_the_contexts_end_does_not_stop_the_others_drafts(small: Policy, drafter: Eagle3Drafter) -> None:
    """vLLM drafts for nobody while one sequence has no room for k drafts: the engine keeps room behind its context."""
    engine = make(small, drafter, {"method": "eagle3", "draft": "given", "k": 3}, context=64)
    prompts = [[5, 6, 7], [20, 21], [7] * 60]
    ours = sorted(engine.stream(prompts, Sampling(30, 0.0, 0, ignore_eos=True)), key=lambda r: r.prompt_index)
    assert [(len(r.tokens), r.finish_reason) for r in ours] == [(30, "length"), (30, "length"), (4, "context")]
    assert engine.counters.rounds == engine.counters.rows - len(prompts)  # all but the prefills
    engine.close()


@needs_vllm
@slow
def test_a_seed_gives_the_same_samples_and_leaves_the_callers_random_state(fresh: Any) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two, other = (fresh.generate(PROMPTS, max_new_tokens=12, n=2, seed=s) for s in (4, 4, 5))
    assert texts(one) == texts(two) != texts(other)
    assert torch.equal(state, torch.get_rng_state())
    assert [(r.prompt_index, r.sample_index) for r in one] == [(p, s) for p in range(len(PROMPTS)) for s in (0, 1)]


@needs_vllm
@slow
def test_mistakes_are_told(fresh: Any, small: Policy) -> None:
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


@needs_vllm
@slow
def test_a_draft_temperature_scales_q_and_keeps_the_law(small: Policy, drafter: Eagle3Drafter) -> None:
    """Through the files at the start and through a load."""
    cold = make(small, drafter, {"method": "eagle3", "draft": "given", "k": 3, "draft_temperature": 0.25})
    for number in (0, 1):
        head = cold._vllm.collective_rpc(lambda worker: worker.model_runner.drafter.model)[0]
        states = torch.randn(4, small.model.config.hidden_size, generator=torch.Generator().manual_seed(number))
        ours = drafter.head.lm_head(states).detach() / 0.25
        torch.testing.assert_close(head.compute_logits(states)[:, drafter.vocabulary], ours, rtol=1e-4, atol=1e-3)
        cold.load(version(number + 1, small, drafter))
    checks = law_checks(cold, small, drafter, [[5, 6, 7]], 600, 5, Sampling(5, 1.0, 12))
    assert all(check.passed for check in checks), checks
    cold.close()


@needs_vllm
@slow
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


@needs_vllm
@slow
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
