"""LoRA in the learner: peft's own layers are the reference; engine, drafter and checkpoints must not notice."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import forerun
from command_line import run_here
from forerun.algorithms.advantages import group_advantages
from forerun.config import DraftConfig, LoraConfig, TrainConfig, load_recipe
from forerun.drafters.eagle3 import Eagle3Drafter, new_head
from forerun.drafters.mtp import MtpDrafter, MtpHead
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.events import finish
from forerun.learner.cotrain import CoTrainer
from forerun.learner.learner import Learner
from forerun.learner.lora import LoraAdapter, find_targets
from forerun.learner.objective import mismatch
from forerun.models import Policy, load_policy
from forerun.models.logprobs import completion_logits
from forerun.training.checkpoint import policy_folder, restore, save_checkpoint
from forerun.types import Rollout

PROMPTS = [[5, 6, 7], [9, 3, 1, 2, 4, 4], [20, 21]]
LORA = LoraConfig(rank=4)
pytestmark = pytest.mark.usefixtures("forked_workers")
Tiny = Callable[..., Path]


def fresh(tiny: Tiny, dtype: str = "float32", family: str = "llama", **changes: Any) -> Policy:
    return load_policy(str(tiny(family, **changes)), dtype, "cpu")


def sampled(policy: Policy) -> tuple[list[Rollout], torch.Tensor]:
    rollouts = LocalEngine(policy, slots=8).generate(PROMPTS, max_new_tokens=12, n=4, seed=1)
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])
    return rollouts, group_advantages(rewards).view(-1)


def adapter_of(learner: Learner) -> LoraAdapter:
    assert learner.adapter is not None
    return learner.adapter


def grown(policy: Policy, size: float = 0.05, **changes: Any) -> Learner:
    """A learner whose adapter already changes the policy: B is not 0."""
    learner = Learner(policy, TrainConfig(lora=LORA, **changes), 1.0)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in adapter_of(learner).layers.values():
            layer.b.normal_(0, size, generator=source)
    adapter_of(learner).merge()
    return learner


def steps(learner: Learner, count: int, rate: float = 1e-2) -> None:
    for _ in range(count):
        rollouts, advantages = sampled(learner.policy)
        finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), rate))


def gradients(learner: Learner, rollouts: list[Rollout], advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one update that is not made, by peft's names."""
    found: dict[str, torch.Tensor] = {}

    def capture(rate: float) -> float:
        for name, layer in adapter_of(learner).layers.items():
            for which, matrix in (("A", layer.a), ("B", layer.b)):
                assert matrix.grad is not None
                found[f"base_model.model.{name}.lora_{which}.default.weight"] = matrix.grad.clone()
        learner.optimizer.clear()
        return 0.0

    learner.optimizer.step = capture  # type: ignore[method-assign]
    finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), 1e-3))
    return found


def naive_loss(model: Any, rollouts: list[Rollout], advantages: torch.Tensor) -> torch.Tensor:
    """-A·ratio at ratio 1, one sequence at a time, over all tokens of the batch."""
    total, count = torch.zeros(()), 0
    for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.tokens])
        rows = torch.log_softmax(model(ids).logits[0].float(), -1)
        at = torch.arange(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        logprobs = rows[at, torch.tensor(rollout.tokens)]
        total = total - ((logprobs - logprobs.detach()).exp() * advantage).sum()
        count += len(rollout.tokens)
    return total / count


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen2", {"microbatch_tokens": 20}),  # biases in attention
        ("gemma2", {"gradient_checkpointing": True}),  # tied embeddings, softcapping
        ("llama", {"packing": True}),
    ],
)
def test_gradients_are_those_of_pefts_own_layers(
    tiny: Tiny, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    policy = fresh(tiny, family=family)
    learner = grown(policy, **changes)
    adapter_of(learner).save(tmp_path, None)
    rollouts, advantages = sampled(policy)
    found = gradients(learner, rollouts, advantages)
    peft = PeftModel.from_pretrained(fresh(tiny, family=family).model, str(tmp_path), is_trainable=True)
    naive_loss(peft, rollouts, advantages).backward()
    expected = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 4
    assert max(float(g.abs().max()) for g in found.values()) > 1e-2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


def test_bfloat16_gradients_are_as_near_as_those_of_full_fine_tuning(tiny: Tiny) -> None:
    """Relative error over all of a run's gradient, against the float32 gradient at the same weights."""

    def of(dtype: str, lora: bool) -> torch.Tensor:
        policy = fresh(tiny, dtype)
        learner = grown(policy) if lora else Learner(policy, TrainConfig(), 1.0)
        if dtype == "float32":  # at the weights that bfloat16 has
            rounded = fresh(tiny, "bfloat16")
            if lora:
                grown(rounded)
            for live, other in zip(policy.model.parameters(), rounded.model.parameters(), strict=True):
                live.data.copy_(other.data)
        seen: list[torch.Tensor] = []

        def capture(rate: float) -> float:
            seen.extend(m.grad.flatten() for m in learner.optimizer.masters if m.grad is not None)
            return 0.0

        learner.optimizer.step = capture  # type: ignore[method-assign]
        finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), 1e-3))
        return torch.cat(seen)

    rollouts, advantages = sampled(fresh(tiny))
    error = {}
    for lora in (True, False):
        exact = of("float32", lora)
        error[lora] = float((of("bfloat16", lora) - exact).norm() / exact.norm())
    assert 0 < error[True] < 2 * error[False] < 0.6, error


def exact_merge(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """W0 + s·B·A in float64."""
    return {
        f"{name}.weight": layer.base.double() + layer.scale * layer.b.detach().double() @ layer.a.detach().double()
        for name, layer in adapter.layers.items()
    }


def test_live_weights_are_what_peft_merges(tiny: Tiny, tmp_path: Path) -> None:
    policy = fresh(tiny)
    learner = Learner(policy, TrainConfig(lora=LORA), 1.0)
    steps(learner, 3)
    adapter_of(learner).save(tmp_path, "somewhere")
    merged = PeftModel.from_pretrained(fresh(tiny).model, str(tmp_path)).merge_and_unload()
    start = fresh(tiny).model.state_dict()
    adapted = {f"{name}.weight" for name in adapter_of(learner).layers}
    for name, live in policy.model.state_dict().items():
        torch.testing.assert_close(live, merged.state_dict()[name], atol=1e-6, rtol=1e-6)
        assert torch.equal(live, start[name]) == (name not in adapted), name
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "somewhere")
    assert "q_proj" in config["target_modules"] and not any("." in name for name in config["target_modules"])


def test_bfloat16_weights_are_neighbours_of_the_exact_merge_and_right_in_the_mean(tiny: Tiny) -> None:
    policy = fresh(tiny, "bfloat16")
    adapter = adapter_of(grown(policy, size=1e-4))
    exact = exact_merge(adapter)
    live = {name: weight.double() for name, weight in policy.model.state_dict().items() if name in exact}
    spacing = 2.0**-7
    assert all(((live[n] - w).abs() <= spacing * w.abs().clamp(min=1e-30)).all() for n, w in exact.items())
    base = torch.cat([layer.base.double().flatten() for layer in adapter.layers.values()])
    change = torch.cat([w.flatten() for w in exact.values()]) - base
    total = torch.zeros_like(change)
    for draw in range(64):
        for number, layer in enumerate(adapter.layers.values()):
            layer.merge(1000 * draw + number)
        total += torch.cat([policy.model.state_dict()[n].double().flatten() for n in exact]) - base
    assert 0.9 < float(total / 64 @ change / (change @ change)) < 1.1
    nearest = torch.cat([w.bfloat16().double().flatten() for w in exact.values()]) - base  # the control
    assert abs(float(nearest @ change / (change @ change)) - 1) > 0.2


def test_the_first_update_starts_from_the_policy_as_it_was(tiny: Tiny) -> None:
    policy = fresh(tiny, "bfloat16")
    rollouts, advantages = sampled(policy)
    plain = finish(Learner(policy, TrainConfig(), 1.0).score(rollouts))
    start = {name: w.clone() for name, w in policy.model.state_dict().items()}
    learner = Learner(policy, TrainConfig(lora=LoraConfig(rank=2, targets=["q_proj", "layers.0.mlp.up_proj"])), 1.0)
    adapter_of(learner).merge()
    assert all(torch.equal(w, start[name]) for name, w in policy.model.state_dict().items())
    scored = finish(learner.score(rollouts))
    assert all(torch.equal(a, b) for a, b in zip(plain.logprobs, scored.logprobs, strict=True))
    finish(learner.update(rollouts, advantages, scored, 1e-2))
    changed = {name for name, w in policy.model.state_dict().items() if not torch.equal(w, start[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)} | {
        "model.layers.0.mlp.up_proj.weight"
    }


def test_an_update_raises_the_good_samples(tiny: Tiny) -> None:
    learner = Learner(fresh(tiny), TrainConfig(lora=LORA), 1.0)
    rollouts, advantages = sampled(learner.policy)
    before = finish(learner.score(rollouts))
    finish(learner.update(rollouts, advantages, before, 1e-2))
    after = finish(learner.score(rollouts))
    rises = [float((x - y).sum()) for x, y in zip(after.logprobs, before.logprobs, strict=True)]
    assert sum(float(a) * rise for a, rise in zip(advantages, rises, strict=True)) > 0


def test_log_probabilities_are_those_of_the_weights_that_generate(tiny: Tiny, tmp_path: Path) -> None:
    policy = fresh(tiny)
    learner = grown(policy)
    rollouts, _ = sampled(policy)
    for rollout, logprobs in zip(rollouts, finish(learner.score(rollouts)).logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, atol=5e-5, rtol=0)

    policy = fresh(tiny, "bfloat16")
    learner = grown(policy)
    rollouts = LocalEngine(policy, slots=32).generate(PROMPTS, max_new_tokens=40, n=16, seed=1)
    merged = mismatch(rollouts, finish(learner.score(rollouts)))["mismatch/kl"]
    adapter_of(learner).close()
    full = mismatch(rollouts, finish(Learner(policy, TrainConfig(), 1.0).score(rollouts)))["mismatch/kl"]
    assert merged == full  # the same weights in the same layers
    adapter_of(learner).save(tmp_path, None)
    apart = PeftModel.from_pretrained(fresh(tiny, "bfloat16").model, str(tmp_path))  # the control
    apart.requires_grad_(True)
    trainer = Learner(Policy(apart, policy.tokenizer, "peft"), TrainConfig(), 1.0)
    assert mismatch(rollouts, finish(trainer.score(rollouts)))["mismatch/kl"] > 2 * merged > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_start_without_a_copy(tiny: Tiny, dtype: str) -> None:
    policy = fresh(tiny, dtype)
    start = Learner(Policy(copy.deepcopy(policy.model), policy.tokenizer, "start"), TrainConfig(), 1.0)
    learner = Learner(policy, TrainConfig(lora=LORA, kl=0.1), 1.0)
    steps(learner, 2)
    rollouts, _ = sampled(policy)
    scored, expected = finish(learner.score(rollouts)), finish(start.score(rollouts)).logprobs
    assert learner.reference is None and scored.reference is not None
    assert all(torch.equal(a, b) for a, b in zip(scored.reference, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(scored.logprobs, expected, strict=True))


def test_the_optimizer_holds_the_adapter_alone(tiny: Tiny) -> None:
    policy = fresh(tiny, "bfloat16")
    learner = Learner(policy, TrainConfig(lora=LORA), 1.0)
    steps(learner, 1)
    shapes = [m.weight.shape for n, m in policy.model.named_modules() if n.endswith("_proj")]
    count = sum(4 * (rows + columns) for rows, columns in shapes)
    held = learner.optimizer.state_dict()
    assert sum(m.nbytes for m in held["masters"]) == 4 * count
    moments = [t for state in held["inner"]["state"].values() for t in state.values() if t.dim() > 0]
    assert sum(t.nbytes for t in moments) == 8 * count
    assert all(p.grad is None and not p.requires_grad for p in policy.model.parameters())
    assert sum(layer.base.nbytes for layer in adapter_of(learner).layers.values()) == sum(2 * r * c for r, c in shapes)


def test_closing_leaves_an_ordinary_policy(tiny: Tiny) -> None:
    policy = fresh(tiny)
    learner = grown(policy)
    rollouts, advantages = sampled(policy)
    scored = finish(learner.score(rollouts))
    learner.close()
    assert all("forward" not in vars(module) for module in policy.model.modules())
    plain = Learner(policy, TrainConfig(), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(scored.logprobs, finish(plain.score(rollouts)).logprobs, strict=True))
    before = policy.model.get_input_embeddings().weight.clone()
    finish(plain.update(rollouts, advantages, scored, 1e-3))
    assert not torch.equal(policy.model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_targets_are_chosen_as_peft_chooses(tiny: Tiny, family: str) -> None:
    for targets in ("all-linear", ["q_proj", "v_proj"], ["layers.1.mlp.down_proj"]):
        ours = find_targets(fresh(tiny, family=family).model, targets)
        peft = get_peft_model(
            fresh(tiny, family=family).model, PeftConfig(target_modules=targets, task_type="CAUSAL_LM")
        )
        assert sorted(ours) == sorted(peft.base_model.targeted_module_names)


# ---- the drafter beside it ----


def ten_steps(
    tiny: Tiny, method: str | None, leak: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Every gradient of A and B, the weights afterwards, and the drafter's losses; see `test_cotrain.py`.

    `leak` is the fault that the comparison must catch: a draft loss that reaches the adapter of the output head.
    """
    policy = fresh(tiny)
    rollouts, advantages = sampled(policy)
    lora = LoraConfig(rank=4, targets=["q_proj", "down_proj", "lm_head"])
    learner = Learner(policy, TrainConfig(microbatch_tokens=60, lora=lora), 1.0)
    seen: list[torch.Tensor] = []
    step_of = learner.optimizer.step

    def recorded(rate: float) -> float:
        seen.extend(m.grad.clone() for m in learner.optimizer.masters if m.grad is not None)
        return step_of(rate)

    learner.optimizer.step = recorded  # type: ignore[method-assign]
    trainer = None if method is None else cotrainer(policy, method)
    losses = []
    for step in range(10):
        if trainer is not None:
            trainer.begin(step)
        scored = finish(learner.score(rollouts, forward=trainer.forward if trainer else completion_logits))
        finish(learner.update(rollouts, advantages, scored, 1e-3))
        if trainer is not None:
            losses.append(trainer.update(step, rollouts, scored.entropies)["draft/loss"])
        if leak:
            (1e-3 * policy.model.lm_head(torch.ones(2, 48)).sum()).backward()
    return seen, dict(policy.model.state_dict()), losses


def cotrainer(policy: Policy, method: str) -> CoTrainer:
    torch.manual_seed(0)
    config = DraftConfig(depth=3, online_learning_rate=1e-3, vocab=40, intermediate=32)
    drafter: Eagle3Drafter | MtpDrafter = MtpDrafter(MtpHead(policy), policy)
    if method == "eagle3":
        drafter = Eagle3Drafter(new_head(policy, [([1], list(range(40)))], config), policy)
    return CoTrainer(drafter, policy, "every-1", config, 1.0, 0)


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_a_drafter_that_trains_beside_it_does_not_touch_the_adapter(tiny: Tiny, method: str) -> None:
    def identical(a: Any, b: Any) -> bool:
        same = len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        return same and all(torch.equal(x, b[1][name]) for name, x in a[1].items())

    off, on = ten_steps(tiny, None), ten_steps(tiny, method)
    assert len(off[0]) == 10 * 2 * 9 and identical(off, on)
    assert on[2][-1] < on[2][0], "the drafter did not learn: the comparison would be idle"
    assert not identical(off, ten_steps(tiny, None, leak=True)), "the comparison misses a leak"


# ---- checkpoints and runs ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    config = TrainConfig(lora=LORA, kl=0.05)
    learner = Learner(fresh(tiny, dtype), config, 1.0)
    steps(learner, 2)
    found = save_checkpoint(tmp_path, 2, learner.policy, learner, None, {}, 1)
    again = Learner(load_policy(str(policy_folder(found, config.lora)), dtype, "cpu"), config, 1.0)
    restore(found, again)
    assert not (found / "policy").exists() and not (found / "reference.pt").exists()
    for _ in range(2):
        ours, theirs = learner.policy.model.state_dict(), again.policy.model.state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
        steps(learner, 2)
        steps(again, 2)
    with pytest.raises(UserError, match=r'train\.lora=\{"rank": 4.*recipe says null'):
        policy_folder(found, None)
    with pytest.raises(UserError, match='"rank": 8'):
        policy_folder(found, LoraConfig(rank=8))


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "tiny", "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "eagle3", "k": 3, "train": "every-1"},
        "draft": {"rollouts": 32, "epochs": 1, "depth": 2, "vocab": 30},
        "rollout": {"slots": 8, "max_new_tokens": 12},
        "train": {"steps": 4, "prompts_per_step": 3, "samples_per_prompt": 4, "learning_rate": 1e-2,
                  "lora": {"rank": 4}},
        "eval": {"every": 0, "prompts": 0}, "checkpoint": {"every": 1},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_resumed_run_goes_on_bit_for_bit(recipe: Path) -> None:
    from forerun.training.run import resumed_recipe, run

    words = {"policy.dtype": "bfloat16", "train.kl": 0.01}
    whole = forerun.train(str(recipe), words)
    half = Path(forerun.train(str(recipe), {**words, "train.steps": 2})["run"])
    continued = finish(run(resumed_recipe(half, {"train.steps": 4}), resume=half))
    assert continued["weights"] == whole["weights"]
    files = [Path(x["paths"]["adapter"]) / "adapter_model.safetensors" for x in (continued, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(UserError, match=r"was made with train\.lora="):
        finish(run(resumed_recipe(half, {"train.steps": 5, "train.lora": None}), resume=half))


@pytest.mark.slow
def test_a_whole_run_with_a_replica_leaves_an_adapter_that_peft_loads(recipe: Path, tiny: Tiny) -> None:
    summary = forerun.train(str(recipe), {"rollout.replicas": 1})
    run = Path(summary["run"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["mismatch/logp_diff_max"] for row in rows if "reward/mean" in row]
    assert len(gaps) == 4 and max(gaps) < 1e-3  # every version reached the replica
    adapter = Path(summary["paths"]["adapter"])
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny("llama"))
    start = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 20, 21]])
    with torch.no_grad():
        before = start(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(run / "hf" / "policy", dtype=torch.float32)(ids).logits
        theirs = PeftModel.from_pretrained(start, str(adapter))(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert float((ours - before).abs().max()) > 1e-2
    again = load_policy(str(tiny("llama")), "float32", "cpu", str(adapter))  # `policy.adapter` takes it too
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, ours, atol=1e-4, rtol=1e-4)


def test_the_adapter_stands_on_a_merged_start(recipe: Path, tiny: Tiny, tmp_path: Path) -> None:
    start = tmp_path / "start"
    adapter_of(grown(fresh(tiny))).save(start, None)
    words = {"policy.adapter": str(start), "speculation.method": "none", "speculation.train": "off", "train.steps": 2}
    summary = forerun.train(str(recipe), words)
    adapter = Path(summary["paths"]["adapter"])
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    merged = load_policy(str(tiny("llama")), "float32", "cpu", str(start))
    saved = AutoModelForCausalLM.from_pretrained(summary["paths"]["policy"], dtype=torch.float32).state_dict()
    for name, weight in PeftModel.from_pretrained(merged.model, str(adapter)).merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, saved[name], atol=1e-5, rtol=1e-5)


# ---- settings ----


def test_refusals_are_sentences(tiny: Tiny) -> None:
    for lora, said in (
        (LoraConfig(targets=["q_porj"]), "names 'q_porj', and no module of LlamaForCausalLM is called so; its linear"),
        (LoraConfig(targets=["mlp"]), "cannot adapt 'model.layers.0.mlp', a LlamaMLP and no plain nn.Linear"),
        (LoraConfig(targets=["embed_tokens"]), "a Embedding and no plain nn.Linear"),
    ):
        policy = fresh(tiny)
        with pytest.raises(UserError, match=said):
            Learner(policy, TrainConfig(lora=lora), 1.0)
        assert all(p.requires_grad for p in policy.model.parameters())
    tied = fresh(tiny, tie_word_embeddings=True)
    with pytest.raises(UserError, match="cannot adapt 'lm_head', which shares its weight with '"):
        Learner(tied, TrainConfig(lora=LoraConfig(targets=["lm_head"])), 1.0)
    for words, said in (
        ({"train.lora.rank": 8, "train.ranks": 2}, "train.ranks=2 shards the policy; set train.ranks=1"),
        ({"train.lora.rank": 0}, "'train.lora.rank'"),
        ({"train.lora.targets": []}, "'train.lora.targets"),
        ({"train.lora.dropout": 0.1}, "Unknown key 'train.lora.dropout'"),
    ):
        with pytest.raises(UserError, match=said) as told:
            load_recipe("quickstart", words)
        assert "\n" not in str(told.value)


def test_a_layer_that_is_never_called_is_refused(tiny: Tiny) -> None:
    policy = fresh(tiny)
    rollouts, advantages = sampled(policy)
    for block in policy.model.model.layers:  # as fused kernels do

        def forward(x: torch.Tensor, mlp: Any = block.mlp) -> torch.Tensor:
            return torch.nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)

        block.mlp.forward = forward
    learner = Learner(policy, TrainConfig(lora=LORA), 1.0)
    with pytest.raises(UserError, match="adapts 'down_proj', which LlamaForCausalLM does not call"):
        finish(learner.update(rollouts, advantages, finish(learner.score(rollouts)), 1e-3))


def test_the_command_line_reaches_into_the_block() -> None:
    words = ["train", "quickstart", "train.lora.rank=8", "train.lora.targets=[q_proj, v_proj]", "--dry-run", "--json"]
    done = run_here(*words)
    lora = {"rank": 8, "alpha": None, "targets": ["q_proj", "v_proj"], "seed": 0}
    assert done.returncode == 0 and json.loads(done.stdout)["train"]["lora"] == lora
    assert load_recipe("quickstart").train.lora is None
    assert LoraConfig(rank=8).scale == 2.0 and LoraConfig(rank=8, alpha=8).scale == 1.0
