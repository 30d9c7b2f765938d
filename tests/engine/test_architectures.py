"""The local engine computes what a model's own forward computes, or refuses the model with a sentence.

Tiny models of families whose layers differ: windows, chunks, wide and narrow values, sinks, attention outside of the
attention interface, convolutions and recurrent states. Texts are longer than every window and chunk.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from benchmarks.architectures import FAMILIES, PROMPTS, RIGHT, WORDS, build, gap_of, largest_gap
from forerun.config.drafters import NgramConfig
from forerun.drafters import Drafter, Rows
from forerun.drafters.base import deterministic_draft
from forerun.drafters.draft_model import ModelDrafter
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.drafters.mtp import MtpDrafter, MtpHead
from forerun.drafters.ngram import NgramDrafter
from forerun.engine.local import self_check
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import request_seed
from forerun.errors import UserError
from forerun.models import Policy, fused
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import check_trees
from forerun.models.interface import PassCache
from forerun.models.recurrent import PassStates, RowStates
from forerun.types import Draft, Rollout
from tiny_models import random_head

FUSED = {
    "LlamaForCausalLM": "Llama, SmolLM2", "MistralForCausalLM": "Mistral", "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
}  # fmt: skip
WINDOWS = ["Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3, Phi-4", "Phi-MoE", "OLMo 3", "Llama 4", "gpt-oss"]
SHARED = ["Gemma 3n", "Gemma 4"]  # layers that read the keys of earlier ones
WIDTHS = ["DeepSeek-V2", "DeepSeek-V3, Kimi-K2", "MiniCPM3", "LongCat"]  # of values and keys
OWN_ATTENTION = ["GPT-J", "CodeGen", "BLOOM", "MPT", "XGLM", "Falcon", "DiffLlama", "Doge", "Nemotron", "AFMoE"]
RECURRENT = [
    "LFM2", "Qwen3-Next", "Qwen3.5", "Bamba", "Granite 4 (hybrid)", "Falcon-H1", "Jamba", "OLMo Hybrid", "Mamba",
    "Mamba 2",
]  # fmt: skip
REFUSED = {
    "Falcon, ALiBi": "nats a token", "GPT-Neo": "nats a token", "MiniMax": "cache of its own",
    "Nemotron-H": "nats a token", "RecurrentGemma": "nats a token", "RWKV": "takes no cache", "xLSTM": "rnn_state",
    "Zamba2": "nats a token",
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Policy:
    config_class, own = FAMILIES[family]
    return build(config_class, own | changes)


@pytest.mark.parametrize("family", [*WINDOWS, *SHARED, *WIDTHS, *OWN_ATTENTION, *RECURRENT])
def test_log_probabilities_are_those_of_the_models_own_forward(family: str) -> None:
    policy = tiny(family)
    for k in (0, 3):
        assert largest_gap(policy, k) < RIGHT


@pytest.mark.parametrize("family", REFUSED)
def test_what_the_engine_cannot_compute_is_refused(family: str) -> None:
    sentence = rf"cannot run {type(tiny(family).model).__name__}: .*{REFUSED[family]}.*; use rollout.engine=vllm"
    with pytest.raises(UserError, match=sentence):
        LocalEngine(tiny(family))


@pytest.mark.parametrize("name", fused.FAMILIES)
def test_the_fused_forward_slides_as_the_module_does(name: str) -> None:
    policy = tiny(FUSED[name])
    assert type(policy.model).__name__ == name and fused.FusedForward.fits(policy.model)
    one, other = (LocalEngine(policy, slots=3, fused=f).generate(PROMPTS, max_new_tokens=20) for f in (True, False))
    assert [r.tokens for r in one] == [r.tokens for r in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


class HalfRight(Drafter):
    """Drafts the known continuation of every request, and a wrong token wherever the position divides by three."""

    name = "half-right"

    def __init__(self, known: list[Rollout]) -> None:
        self.known = {request_seed(0, r.prompt_index, r.sample_index): r.prompt_ids + r.tokens for r in known}

    def propose(self, rows: Rows, budget: torch.Tensor) -> Draft:
        proposals = []
        for seed, length, room in zip(rows.seeds.tolist(), rows.lengths.tolist(), budget.tolist(), strict=True):
            text = list(enumerate(self.known[seed]))[length + 1 : length + 1 + room]
            proposals.append([token if at % 3 else (token + 1) % WORDS for at, token in text])
        return deterministic_draft(proposals, budget.device)


@pytest.mark.parametrize("family", ["Mistral", "Llama 4", "DeepSeek-V2", "LFM2", "Qwen3-Next", "Bamba", "Mamba"])
def test_samples_do_not_depend_on_neighbours_or_drafts(family: str) -> None:
    """States follow their sequences through prefills, copies, rollbacks and freed rows."""
    policy = tiny(family)
    plain = LocalEngine(policy, slots=1).generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2)
    for slots in (2, 8):
        engine = LocalEngine(policy, HalfRight(plain), k=3, slots=slots)
        sampled = engine.generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2)
        assert [r.tokens for r in sampled] == [r.tokens for r in plain]
        assert 0.3 < (engine.counters.round_tokens - engine.counters.rounds) / engine.counters.drafted < 0.9


def refused(policy: Policy, sentence: str, fused: bool = True) -> None:
    self_check.proven.clear()
    with pytest.raises(UserError, match=sentence):
        LocalEngine(policy, fused=fused)


def test_an_engine_made_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault alone; without one the same models pass."""
    conv, delta, chunks = tiny("LFM2"), tiny("Qwen3-Next"), tiny("Llama 4", attention_chunk_size=8192)
    mistral, llama = tiny("Mistral", sliding_window=4096), tiny("Llama, SmolLM2")
    for policy in (conv, delta, chunks, mistral, llama):
        LocalEngine(policy)
    keep = PassStates.keep
    with monkeypatch.context() as patch:  # rejected drafts stay in the state
        patch.setattr(PassStates, "keep", lambda self, last: keep(self, None))
        refused(conv, "nats a token")
        refused(delta, "nats a token")
    with monkeypatch.context() as patch:  # the second sample of a prompt begins with an empty state
        patch.setattr(RowStates, "copy", lambda *_: None)
        refused(conv, "nats a token")
    with monkeypatch.context() as patch:  # padding enters the state
        patch.setattr("forerun.models.forward.PolicyForward.recurrent", False)
        refused(conv, "nats a token")
    with monkeypatch.context() as patch:  # the fused forward sees the whole text
        patch.setattr(fused.FusedForward, "_fuse", _without_window(fused.FusedForward._fuse))
        refused(mistral, "nats a token")
    with monkeypatch.context() as patch:  # the module's mask is ignored
        patch.setattr(SlotPass, "seen", _all_seen)
        patch.setattr("forerun.models.interface._folded", lambda mask, heads, groups: _causal(mask, heads // groups))
        refused(chunks, "nats a token")
    with monkeypatch.context() as patch:  # keys of a copied prompt are lost
        patch.setattr(SlotCache, "copy", lambda *_: None)
        refused(llama, "nats a token")


def _without_window(fuse: Any) -> Any:
    return lambda self, layer, slides: fuse(self, layer, False)


def _all_seen(self: SlotPass) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(self.end)
    return at[None, None], torch.ones(1, 1, self.end, dtype=torch.bool)


def _causal(mask: torch.Tensor, group: int) -> torch.Tensor:
    """Opens all places before a token's own, which is the last open one."""
    last = (mask == 0).long().cumsum(-1).argmax(-1, keepdim=True)
    at = torch.arange(mask.shape[-1])
    return torch.where(at <= last, 0.0, torch.finfo(mask.dtype).min).repeat(1, 1, group, 1)


SMALL_FAULTS = ["Falcon, ALiBi", "Nemotron-H", "Zamba2"]  # fewer nats a token than bfloat16 rounds


def in_bfloat16(family: str) -> Policy:
    policy = tiny(family)
    policy.model.to(torch.bfloat16)
    return policy


@pytest.mark.parametrize("family", SMALL_FAULTS)
def test_what_bfloat16_would_hide_is_found_in_float32(family: str) -> None:
    with pytest.raises(UserError, match=r"nats a token .* in float32"):
        LocalEngine(in_bfloat16(family))


@pytest.mark.parametrize("family", ["Llama, SmolLM2", "LFM2", "Gemma 3"])
def test_a_model_in_bfloat16_has_its_own_tensors_after_the_check(family: str) -> None:
    policy = in_bfloat16(family)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    engine = LocalEngine(policy)
    assert engine.warnings == []
    after = policy.model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    fused_forward = engine._forward.fused
    assert fused_forward is None or fused_forward.current()


def test_a_check_in_bfloat16_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "free_memory", lambda device: 0)
    (warning,) = LocalEngine(in_bfloat16("Zamba2")).warnings
    assert warning.startswith("The engine was checked for 'Zamba2' in bfloat16 alone, where faults below 0.25 nats")


def test_a_layer_that_would_overwrite_its_own_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, update = tiny("Gemma"), PassCache.update

    def twice(self: PassCache, key: Any, value: Any, layer: int) -> Any:
        update(self, key, value, layer)
        return update(self, key, value, layer)

    monkeypatch.setattr(PassCache, "update", twice)
    refused(policy, "layer 0 attends twice in one forward")


def test_layers_of_an_unknown_kind_are_refused() -> None:
    policy = tiny("Gemma")
    policy.model.config.layer_types = ["full_attention", "indexed_attention"] * 2
    refused(policy, "layers of type indexed_attention have no cache here")


def test_the_check_leaves_the_model_as_it_was_and_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny("Mistral", sliding_window=4096)
    config, before = policy.model.config, policy.model.config.to_dict()
    engine = LocalEngine(policy, fused=False)
    assert config.to_dict() == before and config.sliding_window == 4096 and config._attn_implementation == "sdpa"
    assert engine.warnings == []
    monkeypatch.setattr("forerun.engine.local.engine.check_engine", lambda engine: pytest.fail("checked again"))
    LocalEngine(policy, fused=False)


def test_a_window_that_is_too_long_to_be_checked_is_told() -> None:
    assert LocalEngine(tiny("GPT-Neo", window_size=2000, max_position_embeddings=4096)).warnings == [
        "The engine was checked on texts shorter than a window of 'GPTNeo', 2000 tokens"
    ]


def test_texts_that_change_how_all_rows_are_computed_are_refused() -> None:
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 1e4}
    rope = {"original_max_position_embeddings": 40, "rope_parameters": {"rope_type": "longrope", **factors}}
    for policy in (tiny("Llama 4", floor_scale=41), tiny("Phi-3, Phi-4", **rope)):
        engine = LocalEngine(policy, NgramDrafter(NgramConfig()), k=3)
        engine.generate([[1, 2, 3]], max_new_tokens=37)
        with pytest.raises(UserError, match=re.escape("41 tokens, and the local engine computes")):
            engine.generate([[1, 2, 3]], max_new_tokens=38)


class Repeats(Drafter):
    """Drafts the newest token over and over."""

    name = "repeats"

    def propose(self, rows: Rows, budget: torch.Tensor) -> Draft:
        pairs = zip(rows.last.tolist(), budget.tolist(), strict=True)
        return deterministic_draft([[last] * room for last, room in pairs], budget.device)


SHORT = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 30)
FACTORS = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("Llama, SmolLM2", {"rope_type": "dynamic", "factor": 2.0}),
        ("GLM", {"rope_type": "dynamic", "factor": 2.0}),
        ("Llama, SmolLM2", {"rope_type": "longrope", **FACTORS}),
        ("GPT-2", None),
        ("OPT", None),
        ("MPT", None),
    ],
)
def test_no_row_drafts_beyond_the_context_of_another(family: str, rope: dict[str, Any] | None) -> None:
    """The padding of a draft at the end of the context changes no other row, and has a position that the model has."""
    changes = {} if rope is None else {"rope_parameters": rope | {"rope_theta": 1e4}}
    policy = tiny(family, **SHORT, **changes)
    engine = LocalEngine(policy, Repeats(), k=7, slots=4)
    rollouts = engine.generate([[5, 6, 7] * 8, [9, 3], [5, 6, 7] * 3], max_new_tokens=40, n=2)
    assert {r.finish_reason for r in rollouts} == {"context"}
    assert gap_of(policy, rollouts) < RIGHT


def test_recurrent_models_run_no_trees_and_are_no_draft_models() -> None:
    policy = tiny("LFM2")
    with pytest.raises(UserError, match="has conv, recurrent layers; use a drafter that proposes chains"):
        check_trees(policy)
    with pytest.raises(UserError, match="has recurrent layers, and a draft model may have none"):
        ModelDrafter(policy, policy)
    with pytest.raises(UserError, match="has no position_ids; use a drafter that proposes chains"):
        check_trees(tiny("BLOOM"))
    check_trees(tiny("Llama 4"))


def test_heads_that_cannot_read_a_model_are_refused() -> None:
    for family, why in (("Gemma 3n", "has several hidden states per token"), ("Gemma 4", "cannot run in a drafter")):
        policy = tiny(family)
        head: Any = random_head(policy) if family == "Gemma 3n" else MtpHead(policy)
        drafter = Eagle3Drafter(head, policy) if family == "Gemma 3n" else MtpDrafter(head, policy)
        with pytest.raises(UserError, match=why):
            LocalEngine(policy, drafter, k=3).generate(PROMPTS, max_new_tokens=4)
