"""A smaller model as drafter: its q, its cache after partial acceptance, its files; and its distillation."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch

import drafter_contract as contract
from draft_training import watched
from forerun.config import DraftConfig, SpeculationConfig
from forerun.drafters import load_drafter
from forerun.drafters.base import Rows
from forerun.drafters.draft_model import ModelDrafter
from forerun.drafters.training.distill import distill, pruned_copy, validate
from forerun.drafters.training.heads import Validation
from forerun.drafters.training.trainer import TrainingSetup
from forerun.engine.base import Sampling, Weights
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import request_seed
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import PolicyForward
from forerun.training.weights import pack_weights
from forerun.types import Draft, Rollout
from tiny_models import ALPHABET, save_tiny, tiny_tokenizer


def noisy(policy: Policy, scale: float, seed: int = 0) -> Policy:
    """The policy with its weights disturbed: a drafter that is right in part, so that rounds are accepted in part."""
    model = deepcopy(policy.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
    return Policy(model, policy.tokenizer, f"{policy.name}-noisy")


@pytest.fixture(scope="module")
def smaller(tiny: Callable[..., Path]) -> Policy:
    """Another family, fewer layers, another width, and a context shorter than the policy's 128."""
    changes = {"num_hidden_layers": 2, "hidden_size": 32, "max_position_embeddings": 64}
    return load_policy(str(tiny("qwen3", **changes)), "float32", "cpu")


@pytest.mark.parametrize("k", [1, 4])
def test_greedy_identity(policy: Policy, smaller: Policy, k: int) -> None:
    contract.check_greedy_identity(policy, partial(ModelDrafter, smaller, policy), k)
    rollouts = contract.check_greedy_identity(policy, partial(ModelDrafter, noisy(policy, 0.02), policy), k)
    assert 0 < sum(sum(r.drafted) for r in rollouts) < sum(len(r.tokens) for r in rollouts)


@pytest.mark.parametrize("family", ["gemma3", "gemma2"])
def test_families_that_take_the_transformers_path(tiny: Callable[..., Path], family: str) -> None:
    """Sliding windows, soft-capped logits."""
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    contract.check_greedy_identity(policy, partial(ModelDrafter, noisy(policy, 0.01), policy), 3)


def test_every_end(policy: Policy, smaller: Policy) -> None:
    contract.check_every_end(policy, partial(ModelDrafter, smaller, policy))
    rollouts = contract.check_every_end(policy, partial(ModelDrafter, policy, policy))
    assert any(r.drafted[-1] and r.finish_reason == "eos" for r in rollouts), "no drafted end token was accepted"


def test_stop_strings_and_logprobs(policy: Policy) -> None:
    contract.check_stop_strings(policy, partial(ModelDrafter, noisy(policy, 0.02), policy))
    contract.check_logprobs(policy, partial(ModelDrafter, noisy(policy, 0.02), policy))


def test_results_do_not_depend_on_batching(policy: Policy) -> None:
    runs = [
        LocalEngine(policy, ModelDrafter(noisy(policy, 0.02), policy), k=3, slots=slots).generate(
            contract.PROMPTS, max_new_tokens=20, n=2, seed=11
        )
        for slots in (1, 3, 10)
    ]
    assert [r.tokens for r in runs[0]] == [r.tokens for r in runs[1]] == [r.tokens for r in runs[2]]
    assert [r.rounds for r in runs[0]] == [r.rounds for r in runs[1]] == [r.rounds for r in runs[2]]


def test_the_policy_as_its_own_drafter_is_always_right(policy: Policy) -> None:
    """24 tokens in rounds of k + 1 = 4, at temperature 0; the end token is an ordinary one, so that no round is cut."""
    sampling = Sampling(max_new_tokens=24, temperature=0.0, ignore_eos=True)
    engine, plain = LocalEngine(policy, ModelDrafter(policy, policy), k=3, slots=4), LocalEngine(policy, slots=4)
    rollouts, expected = (
        sorted(e.stream(contract.PROMPTS, sampling), key=lambda r: r.prompt_index) for e in (engine, plain)
    )
    assert [r.tokens for r in rollouts] == [r.tokens for r in expected]
    assert engine.metrics()["acceptance_per_position"] == [1.0, 1.0, 1.0]
    assert engine.metrics()["acceptance_length"] == 4.0 and all(r.rounds == 6 for r in rollouts)


class Witness(ModelDrafter):
    """Writes down what it proposed, and from which rows."""

    def propose(self, rows: Rows, budget: torch.Tensor) -> Draft:
        draft = super().propose(rows, budget)
        for b in range(rows.count):
            for slot in range(int(draft.lengths[b])):
                seen = None if draft.log_q is None else draft.log_q[b, slot].clone()
                self.seen.append((int(rows.seeds[b]), int(rows.lengths[b]), draft.tokens[b, :slot].tolist(), seen))
        return draft

    def open(self, rows: int, positions: int, k: int) -> None:
        super().open(rows, positions, k)
        self.seen: list[tuple[int, int, list[int], torch.Tensor | None]] = []


def contexts(witness: Witness, rollouts: list[Rollout], seed: int) -> list[tuple[list[int], torch.Tensor]]:
    """Per draft token: the committed text with the drafts before it, and the q it was drawn from."""
    texts = {request_seed(seed, r.prompt_index, r.sample_index): r.prompt_ids + r.tokens for r in rollouts}
    return [(texts[s][: length + 1] + drafts, q) for s, length, drafts, q in witness.seen if q is not None]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_q_is_that_of_a_full_forward_bit_for_bit(tiny: Callable[..., Path], family: str) -> None:
    """After any number of rounds, accepted in part, in whole or not at all, refilled and moved: no drift.

    Matrix products round by their shape, so the models run in float64, where that stays below float32's last bit.
    """
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    policy.model.double()
    model = noisy(policy, 0.01)
    witness = Witness(model, policy)
    engine = LocalEngine(policy, witness, k=4, slots=3)
    rollouts = engine.generate(contract.PROMPTS, max_new_tokens=30, temperature=0.7, n=2, seed=6)
    rates = engine.metrics()["acceptance_per_position"]
    assert 0.1 < rates[3] < rates[0] < 0.9, "accepted all or nothing: the test would be idle"
    forward, compared = PolicyForward(model, ()), 0
    for text, log_q in contexts(witness, rollouts, 6)[::2]:
        n = len(text)
        slots = SlotPass(SlotCache(1, n), 0, torch.zeros(1, dtype=torch.int64), n, n, fresh=True)
        logits, _ = forward(torch.tensor([text]), slots)
        assert logits is not None
        expected = torch.log_softmax(logits[0, -1].float() / torch.tensor(0.7), -1)
        assert torch.equal(log_q, expected), f"context of {n} tokens: {(log_q - expected).abs().max()}"
        with torch.no_grad():  # and the module's own forward, which normalises in float32
            other = model.model(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(log_q, torch.log_softmax(other.float() / 0.7, -1), atol=2e-5, rtol=0)
        compared += 1
    assert compared > 150


def test_rounds_without_it_are_caught_up(policy: Policy) -> None:
    """The engine may ask for no draft for some rounds (a row budget of 0): the cache falls behind by several tokens."""

    class Sometimes(Witness):
        rounds = 0

        def propose(self, rows: Rows, budget: torch.Tensor) -> Draft:
            self.rounds += 1
            if self.rounds % 10 == 0:
                return Draft(rows.last.new_zeros(rows.count, 0), rows.last.new_zeros(rows.count))
            if self.rounds % 5 == 0:
                budget = budget * 0
            return super().propose(rows, budget if self.rounds % 2 else budget * (torch.arange(rows.count) % 2))

    model = noisy(policy, 0.02)
    witness = Sometimes(model, policy)
    engine = LocalEngine(policy, witness, k=3, slots=3)
    rollouts = engine.generate(contract.PROMPTS, max_new_tokens=30, temperature=1.0, n=2, seed=6)
    for text, log_q in contexts(witness, rollouts, 6)[::2]:
        with torch.no_grad():
            expected = torch.log_softmax(model.model(torch.tensor([text])).logits[0, -1], -1)
        torch.testing.assert_close(log_q, expected, atol=5e-5, rtol=0)


def test_mixed_temperatures_and_the_other_proposals(policy: Policy) -> None:
    def draft(proposal: str, temperature: float) -> Draft:
        drafter = ModelDrafter(noisy(policy, 0.02), policy).draw(proposal, temperature)
        drafter.open(4, 32, 3)
        drafter.prefill(2, torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]), None)
        drafter.copy(2, 0)
        drafter.copy(3, 1)
        rows = Rows(torch.tensor([7, 9]), torch.tensor([2, 1]), torch.tensor([4, 5]), torch.tensor([0.0, 0.8]))
        return drafter.propose(rows, torch.tensor([3, 3]))

    sampled, argmax, cold = draft("sampled", 1.0), draft("argmax", 1.0), draft("sampled", 1e-3)
    assert argmax.log_q is None and sampled.log_q is not None and cold.log_q is not None
    assert torch.equal(sampled.tokens[0], argmax.tokens[0])  # the greedy row drafts the argmax
    assert not torch.equal(sampled.tokens[1], argmax.tokens[1])
    assert torch.equal(cold.tokens, argmax.tokens) and float(cold.log_q[1].amax(-1).min()) > -0.01
    torch.testing.assert_close(sampled.log_q[1].exp().sum(-1), torch.ones(3))


def test_beyond_its_own_context_it_drafts_nothing(policy: Policy, smaller: Policy) -> None:
    witness = Witness(smaller, policy)
    rollouts = LocalEngine(policy, witness, k=3, slots=3).generate(
        [*contract.PROMPTS, [30] * 70], max_new_tokens=100, n=2, seed=6
    )
    lengths = [length + len(drafts) for _, length, drafts, _ in witness.seen]
    assert max(lengths) == 63  # the last position from which its 64 reach
    assert max(len(r.prompt_ids) + len(r.tokens) for r in rollouts) > 80
    for text, log_q in contexts(witness, rollouts, 6)[::5]:
        with torch.no_grad():
            expected = torch.log_softmax(smaller.model(torch.tensor([text])).logits[0, -1], -1)
        torch.testing.assert_close(log_q, expected, atol=5e-5, rtol=0)


def test_saved_and_loaded_drafter_is_the_same(policy: Policy, tmp_path: Path) -> None:
    drafter = ModelDrafter(noisy(policy, 0.02), policy)
    drafter.save(tmp_path, {"rollouts": 3})
    assert json.loads((tmp_path / "config.json").read_text())["forerun"] == {"rollouts": 3}
    again = load_drafter(policy, SpeculationConfig(method="model", draft=str(tmp_path)))
    assert isinstance(again, ModelDrafter)
    contract.check_the_same(policy, drafter, again)


def test_weights_must_arrive_whole(policy: Policy) -> None:
    drafter = ModelDrafter(noisy(policy, 0.02), policy)
    engine = LocalEngine(policy, drafter, k=2, slots=2)
    good = pack_weights(3, policy, drafter)
    state = {k: v.clone() for k, v in drafter.state_dict().items()}
    assert engine.load(good).version == 3
    with pytest.raises(UserError, match=r"missing \['lm_head.weight'\]"):
        engine.load(Weights(4, good.checksums, draft={k: v for k, v in state.items() if k != "lm_head.weight"}))
    stale = dict(state, **{"lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(UserError, match="draft weights of version 4"):
        engine.load(Weights(4, good.checksums, draft=stale))
    assert engine.load(Weights(5, good.checksums, draft=state)).checksums == good.checksums


def test_models_with_another_vocabulary_are_refused(policy: Policy, tiny: Callable[..., Path], tmp_path: Path) -> None:
    narrow = load_policy(str(tiny("llama", vocab_size=40)), "float32", "cpu")
    with pytest.raises(UserError, match=r"\(40 tokens\) and the policy .* \(55 tokens\) differ in 15, for example"):
        ModelDrafter(narrow, policy)
    with pytest.raises(UserError, match=r"has 40 tokens and the policy .* has 55, and without both tokenizers"):
        ModelDrafter(Policy(narrow.model, None, "narrow"), policy)
    other = save_tiny(tmp_path / "other")
    swapped = [*ALPHABET[:20], ALPHABET[21], ALPHABET[20], *ALPHABET[22:]]
    tiny_tokenizer(swapped).save_pretrained(other)
    with pytest.raises(UserError, match=r"differ in 2, for example '.' with id 21 and 20"):
        ModelDrafter.load(str(other), policy)
    with pytest.raises(UserError, match=r"draft=/no/folder is no draft model: .*give a folder or a hub name"):
        load_drafter(policy, SpeculationConfig(method="model", draft="/no/folder"))
    with pytest.raises(UserError, match=r"needs speculation\.draft"):
        load_drafter(policy, SpeculationConfig(method="model"))


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama", vocab_size=12, initializer_range=0.25)), "float32", "cpu")


@pytest.mark.parametrize("faulty", [False, True])
def test_samples_follow_the_policys_law(small: Policy, tiny: Callable[..., Path], faulty: bool) -> None:
    """A correct engine fails this less than once in a million seeds; the broken rule lies several percent away."""
    changes = {"vocab_size": 12, "initializer_range": 0.2, "num_hidden_layers": 1}
    model = load_policy(str(tiny("qwen3", **changes)), "float32", "cpu")
    p = contract.law_p_value(small, partial(ModelDrafter, model, small), faulty)
    assert p < 1e-6 if faulty else p > 1e-6


@pytest.mark.parametrize(("width", "faulty"), [(16, False), (10, False), (10, True)])
def test_another_padding_of_the_same_tokens_is_drafted_with(
    small: Policy, tiny: Callable[..., Path], width: int, faulty: bool
) -> None:
    """Wider or narrower than the policy, as Qwen2.5-0.5B is than 7B: q is 0 where only one of them has a row."""
    changes = {"initializer_range": 0.2, "num_hidden_layers": 1}
    model = load_policy(str(tiny("qwen3", vocab_size=width, **changes)), "float32", "cpu").model
    padded = Policy(model, small.tokenizer, "padded")
    p = contract.law_p_value(small, partial(ModelDrafter, padded, small), faulty)
    assert p < 1e-6 if faulty else p > 1e-6
    drafter = ModelDrafter(padded, small)
    rollouts = LocalEngine(small, drafter, k=3, slots=4).generate([[5, 6, 7], [11, 11]], max_new_tokens=40, n=4)
    assert sum(sum(r.drafted) for r in rollouts) > 0
    assert max(t for r in rollouts for t, drafted in zip(r.tokens, r.drafted, strict=True) if drafted) < min(width, 12)


# ---- distillation ----


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_pruned_copies_compute_the_chosen_layers(tiny: Callable[..., Path], family: str) -> None:
    policy = load_policy(str(tiny(family)), "float32", "cpu")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
    with torch.no_grad():
        whole = pruned_copy(policy, [0, 1, 2, 3])
        assert torch.equal(whole(ids).logits, policy.model(ids).logits)
        pruned, reference = pruned_copy(policy, [0, 3]), deepcopy(policy.model)
        layers = reference.model.layers
        reference.model.layers = torch.nn.ModuleList([layers[0], layers[3]])
        reference.config.num_hidden_layers = 2
        if getattr(reference.config, "layer_types", None):
            reference.config.layer_types = [reference.config.layer_types[i] for i in (0, 3)]
        assert torch.equal(pruned(ids, use_cache=False).logits, reference(ids, use_cache=False).logits)
    own = {p.data_ptr() for p in pruned.parameters()}
    assert not own & {p.data_ptr() for p in policy.model.parameters()}
    with pytest.raises(UserError, match=r"layers \[0, 4\] of a policy with layers 0 to 3"):
        pruned_copy(policy, [0, 4])


@pytest.mark.parametrize("loss", ["lk", "kl"])
def test_distillation_raises_acceptance_and_leaves_the_policy_alone(policy: Policy, loss: str) -> None:
    rollouts = LocalEngine(policy, slots=64).generate(
        [[i, i + 1, i + 2] for i in range(1, 41)], max_new_tokens=24, n=4, seed=9
    )
    pairs = [(r.prompt_ids, r.tokens) for r in rollouts]
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    config = DraftConfig(epochs=8, learning_rate=3e-3, batch_tokens=1024, depth=3, loss=loss)
    model, results, losses = pruned_copy(policy, [0, 3]), list[Validation](), list[float]()
    work = distill(model, policy, TrainingSetup(pairs, config, 1.0, 0))
    best = watched(work, lambda s, n, loss: losses.append(loss), lambda e, r: results.append(r))
    assert best.length == max(r.length for r in results) > results[0].length + 0.12
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(v, policy.model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in policy.model.parameters())
    assert validate(model, policy, pairs, config, 1.0).length > results[0].length  # the best epoch's weights are back
    # what validation promises is what the engine measures
    drafter = ModelDrafter(Policy(model, policy.tokenizer, "pruned"), policy)
    work = LocalEngine(policy, drafter, k=3, rule="token", slots=64)
    work.generate([[i, i + 2, i + 1] for i in range(1, 41)], max_new_tokens=24, n=8, seed=10)
    assert work.metrics()["acceptance_per_position"][0] == pytest.approx(best.per_position[0], abs=0.06)


def test_distillation_stops_when_it_no_longer_helps(policy: Policy) -> None:
    """A learning rate that ruins the copy: the start is kept, and training ends after `patience` worse epochs."""
    pairs = [([i, i + 1], [i + 2, i + 3, i + 4]) for i in range(1, 30)]
    config = DraftConfig(epochs=20, patience=2, learning_rate=3.0, batch_tokens=64, depth=2)
    model, epochs = pruned_copy(policy, [0, 1, 2, 3]), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    work = distill(model, policy, TrainingSetup(pairs, config, 1.0, 0))
    best = watched(work, lambda *_: None, lambda e, r: epochs.append(e))
    assert epochs == [0, 1, 2]
    assert best.per_position == pytest.approx([1.0, 1.0], abs=1e-5) and best.length == pytest.approx(3.0, abs=1e-4)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
