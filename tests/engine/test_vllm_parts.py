"""The parts of the vLLM engine that do without vLLM: translation, pieces of a version, bookkeeping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from forerun.config import Recipe, SpeculationConfig
from forerun.drafters import load_drafter
from forerun.engine.base import Counters, Weights
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import LiveSequence
from forerun.engine.vllm.metrics import VllmRequest
from forerun.engine.vllm.settings import translate
from forerun.engine.vllm.state import WeightVersionState
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.workers.weights import Staging, chunks, shapes


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"method": "mtp"}, "prediction heads only inside checkpoints"),
        ({"method": "graft", "draft": "x"}, "draft trees"),
        ({"method": "eagle3", "draft": "x", "draft_temperature": "auto"}, "temperature of the rollouts"),
        ({"method": "model", "draft": "x", "draft_temperature": 0.8}, "temperature of the rollouts"),
        ({"method": "eagle3"}, "needs speculation.draft"),
        ({"method": "vllm", "vllm": {"method": "mimo_mtp"}}, "layers of a published checkpoint"),
        ({"method": "ngram", "vllm": {"num_speculative_tokens": 9}}, "speculation.vllm.num_speculative_tokens"),
        ({"method": "vllm", "vllm": {"method": "suffix"}, "draft_temperature": 0.5}, "temperature of the rollouts"),
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
    trie = of(False, method="trie", k=6)
    assert (trie.config["method"], trie.config["num_speculative_tokens"], trie.rule) == ("custom_class", 6, "token")
    ngram = of(False, method="ngram", k=4, ngram={"prompt_lookup_max": 3, "prompt_lookup_min": 2})
    assert ngram.config == {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2,
    }  # fmt: skip


def test_what_is_vllms_own_is_handed_on() -> None:
    def of(**fields: Any) -> Any:
        return translate(SpeculationConfig.model_validate(fields), None, block=True)

    suffix = of(method="vllm", k=8, vllm={"method": "suffix", "suffix_decoding_max_tree_depth": 12})
    assert (suffix.rule, suffix.notes) == ("token", ())
    assert suffix.config == {"method": "suffix", "num_speculative_tokens": 8, "suffix_decoding_max_tree_depth": 12}
    flash = of(method="vllm", k=7, vllm={"method": "dflash", "model": "folder"})
    assert flash.config["draft_sample_method"] == "probabilistic" and flash.config["rejection_sample_method"] == "block"
    assert flash.rule == "block" and "nothing keeps it aligned" in flash.notes[0]
    by_batch = [[1, 4, 3], [5, 64, 1]]
    assert of(method="ngram", vllm={"num_speculative_tokens_per_batch_size": by_batch}).config == {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 5, "prompt_lookup_min": 5,
        "num_speculative_tokens_per_batch_size": by_batch,
    }  # fmt: skip


def test_vllms_own_drafters_are_refused_elsewhere(policy: Policy) -> None:
    block = {"method": "vllm", "vllm": {"method": "suffix"}}
    base = {"policy": {"model": "x"}, "task": {"name": "gsm8k"}}
    with pytest.raises(ValidationError, match=r"rollout\.engine is local"):
        Recipe.model_validate({**base, "speculation": block})
    with pytest.raises(ValidationError, match="needs the name of a drafter"):
        SpeculationConfig.model_validate({"method": "vllm"})
    assert Recipe.model_validate({**base, "speculation": block, "rollout": {"engine": "vllm"}}).speculation.tokens == 3
    engine = LocalEngine(policy, load_drafter(policy, SpeculationConfig.model_validate(block)), k=3)
    with pytest.raises(UserError, match=r"\(suffix\).*rollout\.engine=vllm"):
        engine.generate([[5, 6, 7]], max_new_tokens=4)


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
    staging.check({g: checksum(s) for g, s in groups.items()})
    with pytest.raises(UserError, match="have checksum other"):
        staging.check(dict.fromkeys(groups, "other"))
    short = Staging.of({g: shapes(s) for g, s in groups.items()})
    for pieces in sent[:-1]:
        short.add(pieces)
    with pytest.raises(UserError, match="elements missing"):
        short.check({})


def test_tokens_behind_the_end_are_taken_back() -> None:
    """Rounds of 4 drafts: 1 plain token, then 3 kept + 1; then 4 kept, of which the end leaves 2."""

    class Spec:
        per_step_accepted = (3, 4)

    class Entry:
        logprob = -1.0

    counters = Counters(rounds=2, round_tokens=4 + 5, drafted=8, accepted_at=[2, 2, 2, 1], drafted_at=[2, 2, 2, 2])
    live = VllmRequest(LiveSequence([1], 0, 0, 0))
    for tokens in ([5], [6, 7, 8, 9], [10, 11]):
        live.add(tokens, [{t: Entry()} for t in tokens], 3)
    live.settle(Spec(), counters)
    assert live.sequence.drafted == [False, True, True, True, False, True, True]
    assert (counters.round_tokens, counters.accepted_at) == (4 + 2, [2, 2, 1, 0])


def test_tokens_behind_a_stop_string_are_taken_back() -> None:
    class Entry:
        logprob = -1.0

    counters = Counters(rounds=1, round_tokens=4, drafted=3, accepted_at=[1, 1, 1], drafted_at=[1, 1, 1])
    live = VllmRequest(LiveSequence([1], 0, 0, 0))
    live.add([6, 7, 8, 9], [{t: Entry()} for t in (6, 7, 8, 9)], 0)
    live.cut(2)
    live.settle(None, counters)
    assert (live.sequence.tokens, live.sequence.drafted) == ([6, 7], [True, True])
    assert (counters.round_tokens, counters.accepted_at) == (2, [1, 1, 0])


def held_after(*steps: str) -> tuple[WeightVersionState, Weights]:
    """An engine's bookkeeping after version 5 and some steps, and a version 6 with all tensors."""
    state = {"a": torch.ones(3)}
    sums = {"policy": checksum(state), "draft": checksum(state)}
    holding = WeightVersionState({"policy": shapes(state), "draft": shapes(state)})
    holding.take(Weights(5, sums))
    for step in steps:
        {"sleep": holding.discard, "break": lambda: holding.lose("It broke")}[step]()
    return holding, Weights(6, sums, state, state)


@pytest.mark.parametrize("steps", [("sleep",), ("break",), ("break", "sleep"), ("sleep", "break")])
def test_where_nothing_is_held_only_whole_versions_are_taken(steps: tuple[str, ...]) -> None:
    holding, right = held_after(*steps)
    assert holding.version is None
    with pytest.raises(UserError, match="load a version again"):
        holding.require()
    for wrong in (replace(right, policy=None), replace(right, draft=None), replace(right, policy=None, draft=None)):
        with pytest.raises(UserError, match=r"holds none .* must carry the tensors"):
            holding.check(wrong)
    assert set(holding.check(right)) == {"policy", "draft"}
    holding.take(right)
    holding.require()
    assert holding.version == 6
    assert (
        holding.check(replace(right, version=4, policy=None, draft=None)) == {}
    )  # these bytes are held: no sleep since


def test_a_version_older_than_the_one_before_the_sleep_is_stale() -> None:
    holding, right = held_after("sleep")
    with pytest.raises(UserError, match="Version 4 is older than version 5"):
        holding.check(replace(right, version=4))
    with pytest.raises(UserError, match="one number, two versions"):
        holding.check(replace(right, version=5, checksums={**right.checksums, "draft": "0" * 16}))
    assert holding.check(replace(right, version=5))
