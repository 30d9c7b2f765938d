"""Packed rows: no sequence sees another, and the update is that of padded rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from forerun.algorithms.advantages import group_advantages
from forerun.config import DraftConfig, TrainConfig
from forerun.drafters.eagle3 import Eagle3Drafter, new_head
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.events import finish
from forerun.learner.cotrain import CoTrainer
from forerun.learner.learner import Learner
from forerun.learner.packing import attend_by_sequence, pack, packed_microbatches, require_packing
from forerun.models import Policy, load_policy
from forerun.models.logprobs import Pair, completion_logits, packed_batch, token_batch, token_logprobs
from tiny_models import ALPHABET

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "mistral"]  # gemma: windows of 8 tokens in every other layer


def texts(lengths: list[tuple[int, int]]) -> list[Pair]:
    source = torch.Generator().manual_seed(2)
    drawn = [torch.randint(1, len(ALPHABET), (p + c,), generator=source).tolist() for p, c in lengths]
    return [(ids[:p], ids[p:]) for ids, (p, _) in zip(drawn, lengths, strict=True)]


PAIRS = texts([(5, 20), (3, 11), (1, 4), (17, 30), (2, 1)])


def logprobs(model: Any, rows: list[list[Pair]], packed: bool = True) -> torch.Tensor:
    batch = packed_batch(rows, torch.device("cpu"))
    batch = batch if packed else replace(batch, position_ids=None)
    return token_logprobs(completion_logits(model, batch), batch.targets, 1.0)


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_each_sequence_alone(
    tiny: Callable[..., Path], family: str, one_by_one: bool
) -> None:
    """Within 1e-5 nats (float32), gradients within 1e-4 of the largest, with Transformers' mask too. Without any mask
    they are off by over 0.1."""
    model = load_policy(str(tiny(family)), "float32", "cpu").model
    alone = torch.cat([logprobs(model, [[pair]], packed=False) for pair in PAIRS])
    alone.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if one_by_one:
        attend_by_sequence(model)
    packed = logprobs(model, [PAIRS])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    packed.sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4 * max(scale, 1e-3), rtol=0)
    with torch.no_grad():
        leaked = (logprobs(model, [PAIRS], packed=False) - alone).abs()
        two_rows = logprobs(model, [PAIRS[:2], PAIRS[2:]])
    assert float(leaked[: len(PAIRS[0][1])].max()) < 1e-5, "the first sequence of a row has nobody to see"
    assert float(leaked.max()) > 0.1
    torch.testing.assert_close(two_rows, alone.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sequences_are_attended_to_one_by_one(tiny: Callable[..., Path], family: str) -> None:
    """What is not a number in one sequence stays there. Under a mask it does not: nothing times it is not a number."""
    model = load_policy(str(tiny(family)), "float32", "cpu").model
    ill = next(t for t in range(1, len(ALPHABET)) if all(t not in p + c for p, c in PAIRS[1:]))
    model.get_input_embeddings().weight[ill] = float("nan")
    row = [([ill, 3], [4, 5]), *PAIRS[1:]]
    masked = logprobs(model, [row])
    attend_by_sequence(model)
    one_by_one = logprobs(model, [row])
    assert masked.isnan().all() and one_by_one[:2].isnan().all() and one_by_one[2:].isfinite().all()


def update(tiny: Callable[..., Path], **changes: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Scores of a batch and weights after an update from it."""
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    rollouts = LocalEngine(policy, slots=8).generate([[5, 6, 7], [9, 3, 1, 2], [4]], max_new_tokens=24, n=4, seed=1)
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])).view(-1)
    learner = Learner(policy, TrainConfig(optimizer="sgd", **changes), 1.0)
    scored = finish(learner.score(rollouts))
    finish(learner.update(rollouts, advantages, scored, 0.1))
    return scored.logprobs, policy.model.state_dict()


@pytest.mark.parametrize(
    "changes", [{}, {"microbatch_tokens": 60, "kl": 0.1}, {"microbatch_tokens": 1}, {"gradient_checkpointing": True}]
)
def test_an_update_from_packed_rows_is_that_from_padded_ones(
    tiny: Callable[..., Path], changes: dict[str, Any]
) -> None:
    padded, packed = update(tiny, **changes), update(tiny, packing=True, **changes)
    for x, y in zip(padded[0], packed[0], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    start = load_policy(str(tiny("llama")), "float32", "cpu").model.state_dict()
    assert max(float((x - start[n]).abs().max()) for n, x in padded[1].items()) > 1e-3
    for name, weight in padded[1].items():
        torch.testing.assert_close(packed[1][name], weight, atol=1e-5, rtol=0)


def test_rows_are_full_and_hold_every_sequence_once() -> None:
    lengths = [5, 17, 3, 9, 30, 2, 2, 8]
    rows = pack(lengths, 34)
    assert sorted(i for row in rows for i in row) == list(range(8))
    assert [sum(lengths[i] for i in row) for row in rows] == [33, 34, 9]
    assert pack([50, 3], 34) == [[0], [1]]
    for tokens in (1, 34, 70, 1000):
        groups = packed_microbatches(lengths, tokens)
        assert sorted(i for group in groups for row in group for i in row) == list(range(8))
        for (row,) in groups:
            assert sum(lengths[i] for i in row) <= tokens or len(row) == 1
    assert packed_microbatches([], 10) == []


def hybrid(name: str, **settings: Any) -> Policy:
    import transformers

    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(shape | heads | settings))
    return Policy(transformers.AutoModelForCausalLM.from_config(config).eval(), None, name)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Lfm2Config", {"layer_types": ["full_attention"] * 3 + ["conv"]}),  # the last layer sees two tokens back
        ("MambaConfig", {"state_size": 8}),
    ],
)
def test_models_that_carry_a_state_across_are_refused(name: str, settings: dict[str, Any]) -> None:
    policy = hybrid(name, **settings)
    with pytest.raises(UserError, match="packing=true"):
        require_packing(policy, 64)


def test_rows_in_which_queries_would_be_scaled_by_their_place_are_refused() -> None:
    """Llama 4 scales them from the start of a row, whatever the positions are. Its chunks follow the positions."""
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    scaled = {"attn_temperature_tuning": True, "floor_scale": 41, "attention_chunk_size": 16}
    policy = hybrid("Llama4TextConfig", **experts, **scaled, head_dim=8, pad_token_id=0)
    with pytest.raises(UserError, match="microbatch_tokens to 40 or less"):
        require_packing(policy, 41)
    pairs = texts([(4, 9), (2, 25)])
    alone = torch.cat([logprobs(policy.model, [[pair]], packed=False) for pair in pairs])
    require_packing(policy, 40)
    torch.testing.assert_close(logprobs(policy.model, [pairs]), alone, atol=1e-5, rtol=0)
    wrong = (logprobs(policy.model, [[pairs[0], *pairs]])[-25:] - alone[-25:]).detach()
    assert float(wrong.abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "settings"), [("FalconConfig", {"alibi": False}), ("DogeConfig", {})])
def test_a_model_that_reads_the_mask_itself_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"fails on packed rows \(.*\); set it to false"):
        require_packing(hybrid(name, **settings), 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_keep_them_apart_are_accepted(tiny: Callable[..., Path], family: str, dtype: str) -> None:
    require_packing(load_policy(str(tiny(family)), dtype, "cpu"), 64)


def test_the_drafter_is_taught_from_one_sequence_per_row(tiny: Callable[..., Path]) -> None:
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    rollouts = LocalEngine(policy, slots=8).generate([[5, 6, 7], [9, 3]], max_new_tokens=12, n=4, seed=1)
    torch.manual_seed(0)
    head = new_head(policy, [([1], list(range(40)))], DraftConfig(vocab=40, intermediate=32))
    trainer = CoTrainer(Eagle3Drafter(head, policy), policy, "every-1", DraftConfig(depth=3), 1.0, 0)
    trainer.begin(0)
    finish(Learner(policy, TrainConfig(packing=True), 1.0).score(rollouts, forward=trainer.forward))
    batch = token_batch([(r.prompt_ids, r.tokens) for r in rollouts], policy.device)
    taught = trainer._teacher_cache[0].tokens
    assert taught.shape == batch.input_ids.shape
    assert sorted(taught.tolist()) == sorted(batch.input_ids.tolist())
