"""The drafter beside the policy: it must learn, and the policy must not notice."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import forerun
from forerun.algorithms.advantages import group_advantages
from forerun.config import DraftConfig, TrainConfig, load_recipe
from forerun.drafters.eagle3 import Eagle3Drafter, Eagle3Head, new_head
from forerun.drafters.mtp import MtpDrafter, MtpHead
from forerun.drafters.ngram import NgramDrafter
from forerun.drafters.training.heads import train_head, validate
from forerun.drafters.training.trainer import TrainingSetup
from forerun.engine.local.engine import LocalEngine
from forerun.errors import Interrupted, UserError
from forerun.events import finish
from forerun.learner.cotrain import CoTrainer, DriftMeter
from forerun.learner.learner import Learner
from forerun.models import Policy, load_policy
from forerun.models.logprobs import completion_logits
from forerun.types import Rollout

PROMPTS = [[5, 6, 7], [9, 3, 1, 2, 4, 4], [20, 21]]
MANY = [[i, i + 1, i + 2] for i in range(1, 25)]
CONFIG = DraftConfig(depth=3, online_learning_rate=1e-3)


def fresh(tiny: Callable[..., Path], dtype: str = "float32") -> Policy:
    return load_policy(str(tiny("llama")), dtype, "cpu")


def drafter_for(method: str, policy: Policy) -> Eagle3Drafter | MtpDrafter:
    torch.manual_seed(0)
    if method == "mtp":
        return MtpDrafter(MtpHead(policy).to(policy.dtype), policy)
    head = new_head(policy, [([1], list(range(40)))], DraftConfig(vocab=40, intermediate=32))
    return Eagle3Drafter(head.to(policy.dtype), policy)


def fixed_batch(policy: Policy) -> tuple[list[Rollout], torch.Tensor]:
    """Rollouts that do not depend on the drafter; those of the second prompt have no advantage."""
    rollouts = LocalEngine(policy, slots=8).generate(PROMPTS, max_new_tokens=12, n=4, seed=1)
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])
    return rollouts, group_advantages(rewards).view(-1)


def ten_steps(
    tiny: Callable[..., Path], method: str | None, leak: bool = False, dtype: str = "float32"
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], list[dict[str, float]]]:
    """Every gradient that the policy's optimizer saw, its weights afterwards, and the drafter's metrics.

    `leak` is the fault that the comparison must catch: a draft loss that reaches the policy's embedding.
    """
    policy = fresh(tiny, dtype)
    rollouts, advantages = fixed_batch(policy)
    learner, seen, metrics = Learner(policy, TrainConfig(microbatch_tokens=60), 1.0), [], []
    step_of = learner.optimizer.step

    def recorded(rate: float) -> float:
        seen.extend(m.grad.clone() for m in learner.optimizer.masters if m.grad is not None)
        return step_of(rate)

    learner.optimizer.step = recorded  # type: ignore[method-assign]
    trainer = None
    if method is not None:
        trainer = CoTrainer(drafter_for(method, policy), policy, "every-1", CONFIG, 1.0, 0)
    for step in range(10):
        if trainer is not None:
            trainer.begin(step)
        scored = finish(learner.score(rollouts, forward=trainer.forward if trainer else completion_logits))
        finish(learner.update(rollouts, advantages, scored, 1e-3))
        if trainer is not None:
            metrics.append(trainer.update(step, rollouts, scored.entropies))
        if leak:
            (1e-3 * policy.model.get_input_embeddings()(torch.tensor([5, 6])).sum()).backward()
    return seen, dict(policy.model.state_dict()), metrics


def identical(a: Any, b: Any) -> bool:
    return (
        len(a[0]) == len(b[0])
        and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        and all(torch.equal(x, b[1][n]) for n, x in a[1].items())
    )


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_the_policys_gradients_and_weights_are_bit_equal_with_and_without(
    tiny: Callable[..., Path], method: str
) -> None:
    off, on = ten_steps(tiny, None), ten_steps(tiny, method)
    start = fresh(tiny).model.state_dict()
    assert len(off[0]) >= 10 * 10 and any(not torch.equal(x, start[n]) for n, x in off[1].items())
    assert identical(off, on)
    losses = [m["draft/loss"] for m in on[2]]
    assert losses[-1] < losses[0], "the drafter did not learn: the comparison would be idle"
    assert not identical(off, ten_steps(tiny, None, leak=True)), "the comparison misses a leak"


def test_bit_equal_in_bfloat16_too(tiny: Callable[..., Path]) -> None:
    off, on = ten_steps(tiny, None, dtype="bfloat16"), ten_steps(tiny, "eagle3", dtype="bfloat16")
    assert identical(off, on) and on[2][-1]["draft/loss"] < on[2][0]["draft/loss"]


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_no_forward_of_the_policy_is_added(tiny: Callable[..., Path], method: str) -> None:
    policy = fresh(tiny)
    rollouts, advantages = fixed_batch(policy)
    learner = Learner(policy, TrainConfig(), 1.0)
    trainer = CoTrainer(drafter_for(method, policy), policy, "every-2", CONFIG, 1.0, 0)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    policy.model.get_decoder().register_forward_pre_hook(count)
    counts, tokens = [], []
    for step in range(2):
        calls = 0
        trainer.begin(step)
        scored = finish(learner.score(rollouts, forward=trainer.forward))
        finish(learner.update(rollouts, advantages, scored, 1e-3))
        metrics = trainer.update(step, rollouts, scored.entropies)
        counts.append(calls)
        tokens.append(metrics.get("draft/tokens"))
    assert counts[0] == counts[1] > 0
    # the second step's update read everything, rollouts without advantage among it
    assert tokens == [None, sum(len(r.tokens) for r in rollouts)]


def test_what_does_not_fit_is_counted(tiny: Callable[..., Path]) -> None:
    policy = fresh(tiny)
    rollouts, _ = fixed_batch(policy)
    total, learner = sum(len(r.tokens) for r in rollouts), Learner(policy, TrainConfig(microbatch_tokens=60), 1.0)
    warnings: list[str] = []
    found = {}
    for gib in (1.0, 5e-5, 0.0):
        config = CONFIG.model_copy(update={"cache_gib": gib})
        drafter = drafter_for("eagle3", policy)
        before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
        trainer = CoTrainer(drafter, policy, "every-1", config, 1.0, 0, warnings.append)
        for step in range(2):
            trainer.begin(step)
            scored = finish(learner.score(rollouts, forward=trainer.forward))
            assert sum(teacher.size_bytes for teacher in trainer._teacher_cache) <= gib * 2**30
            found[gib] = trainer.update(step, rollouts, scored.entropies)
        assert found[gib]["draft/tokens"] + found[gib]["draft/tokens_left_out"] == total
        kept = all(torch.equal(tensor, before[name]) for name, tensor in drafter.state_dict().items())
        assert kept == (gib == 0.0) == ("draft/loss" not in found[gib])
        assert len(warnings) == int(gib == 0.0)
    assert found[1.0]["draft/tokens_left_out"] == 0 < found[5e-5]["draft/tokens"] < total
    assert "draft.cache_gib=0 is too small for any micro-batch of a step (the smallest needs" in warnings[0]


def beside(policy: Policy, head: Eagle3Head, config: DraftConfig, rate: float) -> None:
    """Twenty steps of a policy that is paid for late tokens of the alphabet, `head` training beside it."""
    drafter, learner = Eagle3Drafter(head, policy), Learner(policy, TrainConfig(), 1.0)
    trainer = CoTrainer(drafter, policy, "every-1", config, 1.0, 0)
    engine = LocalEngine(policy, drafter, k=3, slots=96)
    for step in range(20):
        trainer.begin(step)
        rollouts = engine.generate(MANY[:12], max_new_tokens=20, n=8, seed=step)
        rewards = torch.tensor([sum(t > 30 for t in r.tokens) / len(r.tokens) for r in rollouts]).view(12, 8)
        scored = finish(learner.score(rollouts, forward=trainer.forward))
        finish(learner.update(rollouts, group_advantages(rewards).view(-1), scored, rate))
        trainer.update(step, rollouts, scored.entropies)


@pytest.mark.slow
def test_drafts_follow_a_policy_that_moves(tiny: Callable[..., Path]) -> None:
    """One drafter, trained twice as long: beside a policy that moves, and beside one that stands still (the control).

    Both are judged on the policy that moved: what is left between them is the following, not the longer training.
    """
    policy = fresh(tiny)
    first = LocalEngine(policy, slots=64).generate(MANY, max_new_tokens=24, n=4, seed=9)
    pairs = [(r.prompt_ids, r.tokens) for r in first]
    config = DraftConfig(epochs=4, learning_rate=3e-3, batch_tokens=1024, depth=3, vocab=60, online_learning_rate=2e-3)
    torch.manual_seed(0)
    frozen = new_head(policy, pairs, config)
    finish(train_head(frozen, policy, TrainingSetup(pairs, config, 1.0, 0)))
    stale, following = copy.deepcopy(frozen), copy.deepcopy(frozen)
    beside(fresh(tiny), stale, config, 0.0)
    beside(policy, following, config, 3e-3)
    last = LocalEngine(policy, slots=64).generate(MANY, max_new_tokens=24, n=4, seed=99)
    held = [(r.prompt_ids, r.tokens) for r in last]
    lengths = [validate(h, policy, held, config, 1.0).length for h in (frozen, stale, following)]
    assert lengths[2] > max(lengths[:2]) + 0.1, lengths


def test_drift_is_measured_at_matched_entropy() -> None:
    generator = torch.Generator().manual_seed(0)

    def step(meter: DriftMeter, mean_entropy: float, factor: float) -> None:
        """Acceptance length 4 - entropy, times `factor`, on 64 rollouts of 50 rounds."""
        entropies = (mean_entropy + 0.3 * torch.rand(64, generator=generator)).tolist()
        tokens = [round(50 * factor * (4 - e)) for e in entropies]
        meter.observe(entropies, tokens, [50] * 64)

    meter = DriftMeter(window=4)
    for entropy in (0.5, 1.0, 1.5, 1.2):
        step(meter, entropy, 1.0)
        assert meter.drift == 0.0
    assert meter.line is not None and meter.line[:2] == pytest.approx((4, -1), abs=0.02)
    for _ in range(10):
        step(meter, 1.5, 1.0)  # harder texts, the same drafter: acceptance falls by a fifth, drift does not
    assert abs(meter.drift) < 0.01
    again = DriftMeter(window=4)
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for which in (meter, again):
        generator.manual_seed(1)
        for _ in range(10):
            step(which, 1.0, 0.9)
    assert meter.drift == again.drift == pytest.approx(0.1 * (1 - 0.75**10), abs=0.01)
    blind = DriftMeter(window=4)  # the control: without matching, the harder texts alone look like drift
    for _ in range(4):
        step(blind, 0.5, 1.0)
    assert blind.line is not None
    blind.line = (blind.line[0] + blind.line[1] * 0.65, 0.0, 0.0, 9.0)
    for _ in range(10):
        step(blind, 1.5, 1.0)
    assert blind.drift > 0.15


def test_drift_starts_updates(tiny: Callable[..., Path]) -> None:
    policy = fresh(tiny)
    rollouts, _ = fixed_batch(policy)
    config = CONFIG.model_copy(update={"drift_window": 1})
    trainer = CoTrainer(drafter_for("eagle3", policy), policy, "drift", config, 1.0, 0)
    learner, updated = Learner(policy, TrainConfig(), 1.0), []
    for step, rounds in enumerate((1, 1, 2, 2)):  # from the third step on, twice the rounds: acceptance has halved
        trainer.begin(step)
        scored = finish(learner.score(rollouts, forward=trainer.forward))
        batch = [Rollout(**{**fields(r), "rounds": max(1, len(r.tokens) * rounds // 4)}) for r in rollouts]
        updated.append("draft/loss" in trainer.update(step, batch, scored.entropies))
    assert updated == [False, False, False, True]


def fields(rollout: Rollout) -> dict[str, Any]:
    return {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "tiny", "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama", mlp_bias=True)), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "eagle3", "k": 3, "train": "every-2"},
        "draft": {"rollouts": 32, "epochs": 1, "depth": 2, "vocab": 30, "drift_window": 1, "drift_share": 1e-6},
        "rollout": {"slots": 8, "max_new_tokens": 12},
        "train": {"steps": 4, "prompts_per_step": 3, "samples_per_prompt": 4, "learning_rate": 1e-3},
        "eval": {"every": 0, "prompts": 2}, "checkpoint": {"every": 1},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def steps_of(run: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward/mean" in row]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.mark.parametrize(("method", "train"), [("eagle3", "every-2"), ("eagle3", "drift"), ("mtp", "every-1")])
def test_a_resumed_run_goes_on_bit_for_bit(recipe: Path, method: str, train: str) -> None:
    from forerun.training.run import resumed_recipe, run

    changes = {"speculation.method": method, "speculation.train": train}
    whole = forerun.train(str(recipe), changes)
    half = forerun.train(str(recipe), {**changes, "train.steps": 2})
    continued = finish(run(resumed_recipe(Path(half["run"]), {"train.steps": 4}), resume=Path(half["run"])))
    assert continued["weights"] == whole["weights"]
    assert steps_of(continued["run"]) == steps_of(whole["run"])
    still = forerun.train(str(recipe), {**changes, "speculation.train": "off"})
    assert still["weights"]["draft_checksum"] != whole["weights"]["draft_checksum"]
    rows = steps_of(whole["run"])
    assert any("draft/loss" in row for row in rows)
    if train == "every-2":
        assert ["draft/loss" in row for row in rows] == [False, True, False, True]
    assert all(("spec/drift" in row) == (train == "drift") for row in rows)


def test_a_step_that_is_broken_off_changes_neither(tiny: Callable[..., Path]) -> None:
    policy = fresh(tiny)
    rollouts, advantages = fixed_batch(policy)
    drafter = drafter_for("eagle3", policy)
    before = {k: v.clone() for k, v in drafter.state_dict().items()}
    trainer, learner = CoTrainer(drafter, policy, "every-1", CONFIG, 1.0, 0), Learner(policy, TrainConfig(), 1.0)
    trainer.begin(0)
    scored = finish(learner.score(rollouts, forward=trainer.forward))
    with pytest.raises(Interrupted):
        finish(learner.update(rollouts, advantages, scored, 1e-3, stop_requested=lambda: True))
    assert all(torch.equal(v, drafter.state_dict()[k]) for k, v in before.items())
    trainer.config = CONFIG.model_copy(update={"decay": float("nan")})
    metrics = trainer.update(0, rollouts, scored.entropies)
    assert metrics["draft/skipped_updates"] > 0 and metrics["draft/grad_norm"] == 0
    assert all(torch.equal(v, drafter.state_dict()[k]) for k, v in before.items())


def test_settings(recipe: Path, tiny: Callable[..., Path]) -> None:
    assert load_recipe(str(recipe), {"speculation.train": "off"}).speculation.train == "off"
    assert load_recipe(str(recipe), {"speculation.train": "every-12"}).speculation.train == "every-12"
    for wrong in ("every-0", "every", "sometimes", "3"):
        with pytest.raises(UserError, match="train must be off, drift or every-N"):
            load_recipe(str(recipe), {"speculation.train": wrong})
    with pytest.raises(UserError, match="needs a drafter that learns beside the policy"):
        load_recipe(str(recipe), {"speculation.method": "ngram"})
    policy = fresh(tiny)
    with pytest.raises(UserError, match="the drafter is 'ngram'"):
        CoTrainer(NgramDrafter(load_recipe(str(recipe)).speculation.ngram), policy, "drift", CONFIG, 1.0, 0)
