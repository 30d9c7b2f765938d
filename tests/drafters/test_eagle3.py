"""The EAGLE-3 head: files, fit to the policy, and that training and serving compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draft_training import distributions, watched
from drafter_contract import Forced, check_the_same
from forerun.config import DraftConfig
from forerun.drafters.base import Rows
from forerun.drafters.eagle3 import Eagle3Drafter, Eagle3Head, new_head, rotary
from forerun.drafters.training.heads import run_teacher, train_head, validate
from forerun.drafters.training.trainer import TrainingSetup, Validation
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import request_seed
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.models.auxiliary import default_aux_layers
from forerun.types import Draft
from tiny_models import random_drafter, random_head


def test_saved_and_loaded_head_is_the_same(policy: Policy, tmp_path: Path) -> None:
    drafter = random_drafter(policy, vocabulary=[0, 3, 4, 9, 17])
    drafter.save(tmp_path, {"rollouts": 3})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 5
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3]
    again = Eagle3Drafter.load(tmp_path, policy)
    assert again.aux_layers == (0, 1, 3) and again.head.vocabulary.tolist() == [0, 3, 4, 9, 17]
    check_the_same(policy, drafter, again)


def test_offsets_follow_the_published_convention(policy: Policy) -> None:
    head = random_head(policy, vocabulary=[2, 5, 30])
    assert head.d2t.tolist() == [2, 4, 28]  # target id = draft id + offset
    assert head.t2d.nonzero()[:, 0].tolist() == [2, 5, 30]


def test_a_head_for_another_policy_is_refused(policy: Policy, tiny: Callable[..., Path], tmp_path: Path) -> None:
    random_drafter(policy).save(tmp_path, {})
    with pytest.raises(UserError, match="hidden_size 48, and this one has 32"):
        Eagle3Drafter.load(tmp_path, load_policy(str(tiny("llama", hidden_size=32)), "float32", "cpu"))
    with pytest.raises(UserError, match=r"layers \[0, 1, 3\], but the policy has layers 0 to 1"):
        Eagle3Drafter.load(tmp_path, load_policy(str(tiny("llama", num_hidden_layers=2)), "float32", "cpu"))
    config = json.loads((tmp_path / "config.json").read_text())
    layers = {key: config.pop(key) for key in ("eagle_config", "eagle_aux_hidden_state_layer_ids")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not say which layers"):
        Eagle3Drafter.load(tmp_path, policy)
    (tmp_path / "config.json").write_text(json.dumps({**config, **layers}))
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        Eagle3Drafter.load(tmp_path, policy)


def test_default_taps_are_those_of_the_field() -> None:
    assert default_aux_layers(36) == (2, 18, 33) and default_aux_layers(30) == (2, 15, 27)
    assert default_aux_layers(4) == (0, 2, 3) and default_aux_layers(2) == (0, 1, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_training_and_serving_compute_the_same_draft_distribution(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The unroll of training-time test, position by position, against the drafter at work in an engine."""
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    prompts = [[5, 6, 7], [9, 8], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
    plain = LocalEngine(policy, slots=2).generate(prompts, max_new_tokens=20, temperature=0.0)
    drafter = Eagle3Drafter(random_head(policy), policy)
    forced = Forced({request_seed(0, r.prompt_index, 0): r.prompt_ids + r.tokens for r in plain})
    monkeypatch.setattr("forerun.drafters.sampled.sample_draft", forced)
    again = LocalEngine(policy, drafter, k=3, slots=2).generate(prompts, max_new_tokens=20, temperature=0.0)
    assert [r.tokens for r in again] == [r.tokens for r in plain]
    compared = 0
    for rollout in plain:
        seed, length = request_seed(0, rollout.prompt_index, 0), len(rollout.prompt_ids)
        teacher = run_teacher(drafter.head, policy, [(rollout.prompt_ids, rollout.tokens)], 1.0)
        passes = distributions(drafter.head, policy, teacher, 3, 1.0)
        for (which, root, slot), log_q in forced.seen.items():
            place = root + slot - (length - 1)  # teacher row root+slot predicts token root+slot+1
            if which != seed or place >= len(rollout.tokens):
                continue
            log_p, expected = passes[slot]
            row = place - (len(rollout.tokens) - len(log_p))  # the last entry predicts the last token
            torch.testing.assert_close(log_q, expected[row], atol=2e-4, rtol=0)
            compared += 1
    assert compared > 20


def test_unroll_scores_exactly_the_completion(policy: Policy) -> None:
    head = random_head(policy)
    pairs = [([5, 6, 7], [8, 9, 10, 11]), ([4, 5], [6, 7])]
    teacher = run_teacher(head, policy, pairs, 1.0)
    passes = distributions(head, policy, teacher, 3, 1.0)
    # a round starts at the last prompt token or later, and draft j of it needs j completion tokens before its own
    assert [len(log_p) for log_p, _ in passes] == [6, 4, 2]
    with torch.no_grad():
        rows = torch.log_softmax(policy.model(torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits[0], -1)
    torch.testing.assert_close(passes[0][0][:4], rows[2:6], atol=2e-5, rtol=0)


def test_training_raises_acceptance_and_leaves_the_policy_alone(policy: Policy) -> None:
    engine = LocalEngine(policy, slots=64)
    rollouts = engine.generate([[i, i + 1, i + 2] for i in range(1, 41)], max_new_tokens=32, n=6, seed=9)
    pairs = [(r.prompt_ids, r.tokens) for r in rollouts]
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    config = DraftConfig(epochs=12, learning_rate=3e-3, batch_tokens=1024, depth=3, vocab=40)
    head = new_head(policy, pairs, config)
    results: list[Validation] = []
    losses: list[float] = []
    work = train_head(head, policy, TrainingSetup(pairs, config, 1.0, 0))
    best = watched(work, lambda s, n, loss: losses.append(loss), lambda e, r: results.append(r))
    assert best.length == max(r.length for r in results) > results[0].length + 0.15
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(v, policy.model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in policy.model.parameters())
    # what validation promises is what the engine measures
    drafter = Eagle3Drafter(head, policy)
    work = LocalEngine(policy, drafter, k=3, rule="token", slots=64)
    work.generate([[i, i + 2, i + 1] for i in range(1, 41)], max_new_tokens=32, n=8, seed=10)
    measured = work.metrics()["acceptance_per_position"][0]
    assert measured == pytest.approx(validate(head, policy, pairs, config, 1.0).per_position[0], abs=0.05)


def test_a_text_beyond_the_heads_context_drafts_nothing(policy: Policy) -> None:
    """The greedy text is the policy's, drafts come exactly from positions that the head has, and cut rounds count."""
    short, wide = (Eagle3Head(replace(random_head(policy).config, max_position_embeddings=m)) for m in (16, 4096))
    for head in (short, wide):
        head.load_state_dict(random_head(policy).state_dict())
    prompts = [[5, 6, 7], [9, 8, 7, 6], [30] * 25]
    plain = LocalEngine(policy, slots=3).generate(prompts, max_new_tokens=40, temperature=0.0)
    drafted = {}
    for name, head in (("short", short), ("wide", wide)):
        drafter = Eagle3Drafter(head, policy)
        seen: list[tuple[list[int], list[int]]] = []
        original = drafter.propose

        def propose(rows: Rows, budget: Tensor, original: Any = original, seen: Any = seen) -> Draft:
            draft = original(rows, budget)
            seen.append((rows.lengths.tolist(), draft.lengths.tolist()))
            return draft

        drafter.propose = propose  # type: ignore[method-assign]
        engine = LocalEngine(policy, drafter, k=3, slots=3)
        rollouts = engine.generate(prompts, max_new_tokens=40, temperature=0.0)
        assert [r.tokens for r in rollouts] == [r.tokens for r in plain]
        drafted[name] = [pair for lengths, counts in seen for pair in zip(lengths, counts, strict=True)]
        beyond = engine.metrics()["drafter"].get("rows_beyond_drafter_context", 0)
        assert (beyond > 20) == (name == "short")
    assert all(count <= max(0, 17 - length) for length, count in drafted["short"])
    assert any(count == 17 - length for length, count in drafted["short"] if length > 14)  # the last position is used
    assert any(length > 24 and count == 3 for length, count in drafted["wide"])


def test_frequencies_stay_exact_in_half_precision(policy: Policy) -> None:
    head = random_head(policy)
    expected, _ = rotary(head.config)
    cos, _ = head.to(torch.bfloat16).angles(torch.tensor([[1000]]))
    torch.testing.assert_close(cos[0, 0, :4], (1000 * expected).cos(), atol=1e-4, rtol=0)
