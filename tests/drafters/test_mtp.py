"""Multi-token-prediction heads: files in the published names, the drafter's contract, training against serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_training import watched
from drafter_contract import (
    Forced,
    check_every_end,
    check_greedy_identity,
    check_logprobs,
    check_stop_strings,
    check_the_same,
    law_p_value,
)
from forerun.config import DraftConfig, TrainConfig
from forerun.drafters.mtp import MtpDrafter, MtpHead
from forerun.drafters.mtp_checkpoints import read_heads
from forerun.drafters.training.heads import (
    mean_acceptance,
    run_teacher,
    train_head,
    unrolled_losses,
    validate,
    weighted_loss,
)
from forerun.drafters.training.trainer import TrainingSetup, Validation
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import request_seed
from forerun.errors import UserError
from forerun.learner.learner import Learner
from forerun.models import Policy, load_policy
from forerun.models.auxiliary import AuxiliaryStates


@pytest.fixture(scope="module")
def policy(tiny: Callable[..., Path]) -> Policy:
    """A tiny Llama whose forward is Transformers' own (biases in its MLP keep it off the fused path)."""
    return load_policy(str(tiny("llama", mlp_bias=True)), "float32", "cpu")


def head_of(policy: Policy, layers: int = 1, seed: int = 0, ids: list[int] | None = None) -> MtpHead:
    torch.manual_seed(seed)
    return MtpHead(policy, layers, None if ids is None else torch.tensor(ids))


def drafter_of(policy: Policy, layers: int = 1, ids: list[int] | None = None) -> MtpDrafter:
    return MtpDrafter(head_of(policy, layers, ids=ids), policy)


def test_the_last_tap_is_what_the_output_head_reads(policy: Policy) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with torch.no_grad(), AuxiliaryStates(policy.model, (0, 4)) as aux_layers:
        logits = policy.model(ids).logits
    features = aux_layers.features()
    assert features is not None and features.shape == (2, 4, 96)
    torch.testing.assert_close(head_of(policy).shared.logits(features[..., 48:]), logits, atol=0, rtol=0)
    assert torch.equal(features[..., :48], policy.model.get_input_embeddings()(ids))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("k", [1, 4])
def test_greedy_identity(policy: Policy, layers: int, k: int) -> None:
    check_greedy_identity(policy, lambda: drafter_of(policy, layers), k)


@pytest.mark.parametrize("layers", [1, 3])
def test_ends_stops_and_logprobs(policy: Policy, layers: int) -> None:
    check_every_end(policy, lambda: drafter_of(policy, layers))
    check_stop_strings(policy, lambda: drafter_of(policy, layers))
    check_logprobs(policy, lambda: drafter_of(policy, layers))


@pytest.mark.slow
def test_the_law_is_the_policys(tiny: Callable[..., Path]) -> None:
    """Chi-square at 20000 samples; a verifier without residual is found out."""
    small = load_policy(str(tiny("llama", vocab_size=8, mlp_bias=True)), "float32", "cpu")
    assert law_p_value(small, lambda: drafter_of(small), faulty=False) > 1e-3
    assert law_p_value(small, lambda: drafter_of(small), faulty=True) < 1e-6
    assert law_p_value(small, lambda: drafter_of(small, ids=[0, 2, 5, 7]), faulty=False) > 1e-3
    assert law_p_value(small, lambda: drafter_of(small, ids=[0, 2, 5, 7]), faulty=True) < 1e-6


def test_a_draft_vocabulary_keeps_its_rows_of_the_output_head(policy: Policy, tmp_path: Path) -> None:
    ids = [3, 4, 5, 8, 13, 21, 34]
    whole, some = head_of(policy), head_of(policy, ids=ids)
    states = torch.randn(5, 48)
    torch.testing.assert_close(some.logits(states), whole.logits(states)[:, ids])
    check_greedy_identity(policy, lambda: MtpDrafter(some, policy), 3)
    MtpDrafter(some, policy).save(tmp_path, {})
    again = MtpDrafter.load(tmp_path, policy)
    assert again.head.vocabulary.tolist() == ids and again.state_dict().keys() == some.state_dict().keys()
    assert whole.vocabulary.tolist() == list(range(policy.model.config.vocab_size))


@pytest.mark.parametrize("loss", ["lk", "ce", "e2e"])
def test_a_draft_vocabulary_of_all_tokens_is_judged_like_none(policy: Policy, loss: Literal["lk", "ce", "e2e"]) -> None:
    pairs = [([5, 6, 7], list(range(8, 30))), ([4, 5], [6, 7, 8])]
    config = DraftConfig(depth=3, loss=loss)
    found = []
    for ids in (None, list(range(policy.model.config.vocab_size)), [4, 5, 6, 9, 11, 20]):
        head = head_of(policy, 2, ids=ids)
        passes = unrolled_losses(head, policy, run_teacher(head, policy, pairs, 0.8), config, 0.8)
        weighted_loss(passes, 1.0).backward()
        found.append((passes, head.layers[0].eh_proj.weight.grad))
    (whole, slope), (same, same_slope), (some, _) = found
    torch.testing.assert_close(same_slope, slope, atol=1e-6, rtol=1e-3)
    for a, b, c in zip(whole, same, some, strict=True):
        torch.testing.assert_close(b.loss, a.loss, atol=1e-5, rtol=1e-4)
        assert a.rows == b.rows == c.rows and b.accepted == pytest.approx(a.accepted, rel=1e-4)
        assert c.accepted < a.accepted  # what it cannot draft is lost


@pytest.mark.parametrize(
    ("family", "layers", "changes"),
    [
        ("llama", 1, {"mlp_bias": True}), ("llama", 3, {"mlp_bias": True}), ("gemma2", 1, {}), ("gemma3", 2, {}),
        ("llama", 1, {}), ("qwen3", 2, {}),  # these take the fused forward
    ],
)  # fmt: skip
def test_training_and_serving_compute_the_same_draft_distribution(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str, layers: int, changes: dict[str, bool]
) -> None:
    policy = load_policy(str(tiny(family, **changes)), "float32", "cpu")
    prompts = [[5, 6, 7], [9, 8], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
    plain = LocalEngine(policy, slots=2).generate(prompts, max_new_tokens=20, temperature=0.0)
    drafter = MtpDrafter(head_of(policy, layers), policy)
    truth = {request_seed(0, r.prompt_index, 0): r.prompt_ids + r.tokens for r in plain}
    # a wrong draft in the middle now and then: what it left in the window must be read again
    forced = Forced(truth, lambda root, slot: slot == 1 and root % 3 == 0)
    monkeypatch.setattr("forerun.drafters.sampled.sample_draft", forced)
    again = LocalEngine(policy, drafter, k=4, slots=2).generate(prompts, max_new_tokens=20, temperature=0.0)
    assert [r.tokens for r in again] == [r.tokens for r in plain]
    compared = [0] * 4
    for rollout in plain:
        seed, length = request_seed(0, rollout.prompt_index, 0), len(rollout.prompt_ids)
        teacher = run_teacher(drafter.head, policy, [(rollout.prompt_ids, rollout.tokens)], 1.0)
        expected = unrolled(drafter.head, teacher, 4)
        for (which, root, slot), log_q in forced.seen.items():
            place = root + slot - (length - 1)
            if which != seed or place >= len(rollout.tokens) or (slot > 1 and root % 3 == 0):
                continue
            row = place - (len(rollout.tokens) - len(expected[slot]))
            torch.testing.assert_close(log_q, expected[slot][row].float(), atol=2e-3, rtol=0)  # deep chains of float32
            compared[slot] += 1
    assert min(compared) >= 5, compared


def unrolled(head: MtpHead, teacher, depth: int) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    from forerun.drafters.mtp import unroll_mtp

    with torch.no_grad():
        passes = unroll_mtp(head, teacher.tokens, teacher.features, teacher.scored, depth)
        return [torch.log_softmax(head.shared.logits(states), -1) for states in passes]


def test_saved_and_loaded_heads_are_the_same(policy: Policy, tmp_path: Path) -> None:
    drafter = drafter_of(policy, 2)
    drafter.save(tmp_path, {"rollouts": 3})
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"model.layers.4.eh_proj.weight", "model.layers.5.shared_head.norm.weight"} <= names
    assert {"model.layers.4.enorm.weight", "model.layers.4.hnorm.weight", "model.layers.4.mlp.up_proj.weight"} <= names
    assert not any("head.head" in n or "embed" in n for n in names)
    again = MtpDrafter.load(tmp_path, policy)
    assert again.aux_layers == (4,)
    check_the_same(policy, drafter, again)


def test_heads_for_another_policy_are_refused(policy: Policy, tiny: Callable[..., Path], tmp_path: Path) -> None:
    drafter_of(policy).save(tmp_path, {})
    with pytest.raises(UserError, match="hidden_size 48, and this one has 32"):
        MtpDrafter.load(tmp_path, load_policy(str(tiny("llama", hidden_size=32)), "float32", "cpu"))
    with pytest.raises(UserError, match="num_hidden_layers 4, and this one has 2"):
        MtpDrafter.load(tmp_path, load_policy(str(tiny("llama", num_hidden_layers=2)), "float32", "cpu"))
    with pytest.raises(UserError, match="no tensors of multi-token-prediction heads"):
        MtpDrafter.load(Path(tiny("llama", mlp_bias=True)), policy)
    broken = load_file(tmp_path / "model.safetensors")
    del broken["model.layers.4.hnorm.weight"]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing \['layers.0.hnorm.weight'\]"):
        MtpDrafter.load(tmp_path, policy)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        MtpDrafter.load(tmp_path, policy)


LAYOUTS = {  # ours of one layer -> the name in a published checkpoint of a policy with 4 layers
    "deepseek": lambda n: {
        "enorm": "model.layers.4.enorm", "hnorm": "model.layers.4.hnorm", "eh_proj": "model.layers.4.eh_proj",
        "norm": "model.layers.4.shared_head.norm",
    }.get(n, f"model.layers.4.{n.removeprefix('block.')}"),
    "mimo": lambda n: {
        "enorm": "model.mtp_layers.0.token_layernorm", "hnorm": "model.mtp_layers.0.hidden_layernorm",
        "eh_proj": "model.mtp_layers.0.input_proj", "norm": "model.mtp_layers.0.final_layernorm",
    }.get(n, f"model.mtp_layers.0.{n.removeprefix('block.')}"),
    "qwen3_next": lambda n: {
        "enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden", "eh_proj": "mtp.fc",
        "norm": "mtp.norm",
    }.get(n, f"mtp.layers.0.{n.removeprefix('block.')}"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_are_read_from_a_checkpoint_of_the_policy(
    policy: Policy, tiny: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    """A hand-made checkpoint: the trunk in one file, the heads in another, as published models carry them."""
    trunk = load_file(Path(tiny("llama", mlp_bias=True)) / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(tiny("llama", mlp_bias=True)) / "config.json").read_text())
    generator = torch.Generator().manual_seed(3)
    heads, expected = {}, {}
    for name, tensor in head_of(policy).state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        part, leaf = name.removeprefix("layers.0.").rsplit(".", 1)
        expected[name] = value
        swapped = layout == "mimo" and part == "eh_proj"  # its projection reads the hidden state first
        heads[f"{LAYOUTS[layout](part)}.{leaf}"] = torch.cat([value[:, 48:], value[:, :48]], 1) if swapped else value
    if layout == "deepseek":
        heads["model.layers.4.embed_tokens.weight"] = torch.zeros(3, 48)
        heads["model.layers.4.shared_head.head.weight"] = torch.zeros(3, 48)
    save_file(trunk, tmp_path / "model-00001-of-00002.safetensors")
    save_file(heads, tmp_path / "model-00002-of-00002.safetensors")
    loaded = MtpDrafter.load(tmp_path, policy).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_names_of_the_published_layouts(tmp_path: Path) -> None:
    """Golden: written out by hand from the published indices, two layers."""
    names = {
        "model.layers.60.mlp.up_proj.weight": None,
        "model.layers.61.eh_proj.weight": "layers.0.eh_proj.weight",
        "model.layers.61.self_attn.o_proj.weight": "layers.0.block.self_attn.o_proj.weight",
        "model.layers.62.shared_head.norm.weight": "layers.1.norm.weight",
        "model.layers.62.shared_head.head.weight": None,
        "model.norm.weight": None,
    }
    save_file({n: torch.full((2, 2), float(i)) for i, n in enumerate(names)}, tmp_path / "a.safetensors")
    found = read_heads(tmp_path, 61)
    assert {n: float(t[0, 0]) for n, t in found.items()} == {o: i for i, o in enumerate(names.values()) if o}
    (tmp_path / "a.safetensors").unlink()
    qwen = {
        "mtp.fc.weight": 1.0, "mtp.norm.weight": 2.0, "mtp.pre_fc_norm_hidden.weight": 3.0,
        "mtp.layers.0.input_layernorm.weight": 4.0, "mtp.layers.1.input_layernorm.weight": 5.0, "lm_head.weight": 6.0,
    }  # fmt: skip
    save_file({n: torch.full((2, 2), v) for n, v in qwen.items()}, tmp_path / "b.safetensors")
    assert {n: float(t[0, 0]) for n, t in read_heads(tmp_path, 48).items()} == {
        **{f"layers.{d}.eh_proj.weight": 1.0 for d in (0, 1)},
        **{f"layers.{d}.norm.weight": 2.0 for d in (0, 1)},
        **{f"layers.{d}.hnorm.weight": 3.0 for d in (0, 1)},
        "layers.0.block.input_layernorm.weight": 4.0,
        "layers.1.block.input_layernorm.weight": 5.0,
    }


@pytest.mark.parametrize(("layers", "ids"), [(1, None), (2, None), (1, list(range(0, 55, 2)))])
def test_training_raises_acceptance_and_leaves_the_policy_alone(
    policy: Policy, layers: int, ids: list[int] | None
) -> None:
    engine = LocalEngine(policy, slots=64)
    rollouts = engine.generate([[i, i + 1, i + 2] for i in range(1, 41)], max_new_tokens=32, n=6, seed=9)
    pairs = [(r.prompt_ids, r.tokens) for r in rollouts]
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    config = DraftConfig(epochs=6, learning_rate=3e-3, batch_tokens=1024, depth=3)
    head = head_of(policy, layers, ids=ids)
    results: list[Validation] = []
    work = train_head(head, policy, TrainingSetup(pairs, config, 1.0, 0))
    best = watched(work, lambda *_: None, lambda e, r: results.append(r))
    assert best.length == max(r.length for r in results) > results[0].length + 0.1
    assert all(torch.equal(v, policy.model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in policy.model.parameters())
    work = LocalEngine(policy, MtpDrafter(head, policy), k=3, rule="token", slots=64)
    work.generate([[i, i + 2, i + 1] for i in range(1, 41)], max_new_tokens=32, n=8, seed=10)
    measured = work.metrics()["acceptance_per_position"][0]
    assert measured == pytest.approx(validate(head, policy, pairs, config, 1.0).per_position[0], abs=0.05)


def test_parts_of_a_batch_add_up_to_the_whole(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    head, config = head_of(policy), DraftConfig(depth=2)
    teacher = run_teacher(head, policy, [([5, 6, 7], list(range(8, 30))), ([4, 5], [6, 7, 8])], 1.0)
    whole = unrolled_losses(head, policy, teacher, config, 1.0)
    whole[0].loss.backward()
    gradient = head.layers[0].eh_proj.weight.grad.clone()
    head.zero_grad()
    monkeypatch.setattr("forerun.drafters.training.heads.ROWS", 3)
    monkeypatch.setattr("forerun.drafters.training.heads.KEPT_BYTES", 0)
    parts = unrolled_losses(head, policy, teacher, config, 1.0)
    parts[0].loss.backward()
    torch.testing.assert_close(head.layers[0].eh_proj.weight.grad, gradient, atol=1e-6, rtol=1e-4)
    assert mean_acceptance([parts]).per_position == pytest.approx(mean_acceptance([whole]).per_position, abs=1e-5)
    assert json.dumps(mean_acceptance([whole]).length)


def test_a_head_copies_a_layer_without_what_a_learner_does_in_it(tiny: Callable[..., Path]) -> None:
    own = load_policy(str(tiny("llama")), "float32", "cpu")
    learner = Learner(own, TrainConfig(gradient_checkpointing=True), 1.0)
    assert any("forward" in vars(module) for module in own.model.modules())
    assert not any("forward" in vars(module) for module in MtpHead(own).modules())
    learner.close()
