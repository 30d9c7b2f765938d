"""A drafter beside a sharded policy: the drafter that one process trains, and a policy that does not notice.

float32 sums come in another order, and AdamW turns any small gradient into a full step: a weight whose gradient is near
0 may step the other way. So the drafters agree when fewer than one weight in a hundred differs by more than 1e-4, a
tenth of a step (4 in 10,000 were seen, 92 in a hundred in the negative control). AdamW does not see the size of a
gradient; the metrics do. Those of the first optimizer step, which nothing has amplified yet, agree within 1e-4 (6e-6
was seen, with split layers); a gradient that is not added up, or twice, changes its norm by half or more. Later ones
agree within 1e-3, an MTP head's norms within 2e-2: `test_rounding_alone_moves_later_gradients` says why.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import forerun
from forerun.algorithms.advantages import group_advantages
from forerun.config import DraftConfig, TrainConfig
from forerun.drafters.eagle3 import Eagle3Drafter, new_head
from forerun.drafters.mtp import MtpDrafter, MtpHead
from forerun.drafters.training.heads import TeacherBatch, rows_by_position, run_teacher, unrolled_losses, weighted_loss
from forerun.engine.local.engine import LocalEngine
from forerun.events import finish
from forerun.learner import cotrain
from forerun.learner.cotrain import CoTrainer
from forerun.learner.cotrain_distributed import GroupCoTrainer, Score
from forerun.learner.distributed import LearnerGroup
from forerun.learner.learner import Learner
from forerun.models import Policy, load_policy
from forerun.models.logprobs import microbatches
from forerun.training import run as runs
from forerun.training import state
from forerun.types import Rollout
from forerun.workers.local import LocalLauncher
from forerun.workers.server import PROGRAM

pytestmark = pytest.mark.usefixtures("forked_workers")
PROMPTS = [[5, 6, 7], [9, 3, 1, 2, 4, 4], [20]]
REWARDS = [[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]]  # the second group has zero advantages
CONFIG = DraftConfig(depth=3, online_learning_rate=1e-3)
TRAIN = TrainConfig(optimizer="sgd", max_grad_norm=1e3, microbatch_tokens=60, silence_s=20)
LEFT_OUT = f"""
import torch.distributed as dist
from forerun.learner.cotrain_worker import RankCoTrainer
caching_forward = RankCoTrainer.caching_forward
def on_rank_0(self, rollouts, batches):
    return caching_forward(self, rollouts, batches if dist.get_rank() == 0 else [[]] * len(batches))
RankCoTrainer.caching_forward = on_rank_0
{PROGRAM}
"""
Drafter = Eagle3Drafter | MtpDrafter
Batch = tuple[list[Rollout], Tensor]


def fresh(tiny: Callable[..., Path], dtype: str = "float32") -> Policy:
    return load_policy(str(tiny("llama", tie_word_embeddings=True)), dtype, "cpu")


def drafter_for(method: str, policy: Policy) -> Drafter:
    torch.manual_seed(0)
    if method.startswith("mtp"):
        vocabulary = torch.arange(0, 50, 2) if method == "mtp, reduced" else None
        return MtpDrafter(MtpHead(policy, 2, vocabulary).to(policy.dtype), policy)
    head = new_head(policy, [([1], list(range(40)))], DraftConfig(vocab=40, intermediate=32))
    return Eagle3Drafter(head.to(policy.dtype), policy)


def batches_of(policy: Policy) -> list[Batch]:
    """Twelve rollouts, one (fewer than there are ranks), and twelve again."""
    rollouts = LocalEngine(policy, slots=8).generate(PROMPTS, max_new_tokens=12, n=4, seed=1)
    advantages = group_advantages(torch.tensor(REWARDS)).view(-1)
    return [(rollouts, advantages), (rollouts[:1], advantages[:1]), (rollouts, advantages)]


def one_optimizer_step(batches: Sequence[Batch]) -> list[Batch]:
    """Four rollouts that fit into one micro-batch: the drafter's first optimizer step, on rows of every rank."""
    rollouts, advantages = batches[0]
    assert microbatches([len(r.prompt_ids) + len(r.tokens) for r in rollouts[:4]], TRAIN.microbatch_tokens) == [
        [0, 1, 2, 3]
    ]
    return [(rollouts[:4], advantages[:4])]


def steps(
    learner: Learner | LearnerGroup, score: Score, trainer: CoTrainer | GroupCoTrainer | None,
    batches: Sequence[Batch], first: int = 0,
) -> list[dict[str, float]]:  # fmt: skip
    """Metrics of some steps."""
    found = []
    for step, (rollouts, advantages) in enumerate(batches, first):
        if trainer is not None:
            trainer.begin(step)
        scored = finish(score(rollouts))
        metrics = finish(learner.update(rollouts, advantages, scored, 0.01))
        metrics |= {} if trainer is None else trainer.update(step, rollouts, scored.entropies)
        found.append({name: value for name, value in metrics.items() if not name.startswith("time/")})
    return found


def alone(
    tiny: Callable[..., Path], method: str, batches: Sequence[Batch], config: DraftConfig = CONFIG,
    train: str = "every-1", dtype: str = "float32",
) -> tuple[Drafter, list[dict[str, float]]]:  # fmt: skip
    """The drafter of one process, and its metrics."""
    policy = fresh(tiny, dtype)
    learner, drafter = Learner(policy, TRAIN, 1.0), drafter_for(method, policy)
    trainer = CoTrainer(drafter, policy, train, config, 1.0, 0)
    return drafter, steps(learner, lambda r: learner.score(r, trainer.forward), trainer, batches)


def agree(found: dict[str, float], expected: dict[str, float], method: str, first: bool = False) -> bool:
    """Whether two steps have the same metrics. `first`: the drafter's first optimizer step was the only one."""
    later = {"draft/grad_norm": 2e-2} if method.startswith("mtp") else {}
    assert found.keys() == expected.keys()
    return all(
        value == pytest.approx(expected[name], rel=1e-4 if first else later.get(name, 1e-3), abs=1e-5)
        for name, value in found.items()
    )


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Share of weights that differ by more than 1e-4."""
    far = torch.cat([((a[name].float() - b[name].float()).abs() > 1e-4).flatten() for name in b]).float()
    return float(far.mean())


@dataclass
class Bench:
    """A group with its policy, and how it began."""

    group: LearnerGroup
    policy: Policy
    start: Path
    batches: list[Batch]
    off: list[dict[str, float]]  # metrics of the steps without a drafter, and the weights after them
    weights: dict[str, Tensor]

    def trainer(self, method: str, config: DraftConfig = CONFIG, train: str = "every-1") -> GroupCoTrainer:
        """With a new drafter, beside the policy as it began."""
        self.group.restore(self.start)
        return GroupCoTrainer(self.group, drafter_for(method, self.policy), train, config, 0)

    def steps(self, trainer: GroupCoTrainer, batches: Sequence[Batch], first: int = 0) -> list[dict[str, float]]:
        return steps(self.group, trainer.score, trainer, batches, first)


@contextmanager
def ranks(policy: Policy, program: str = PROGRAM) -> Iterator[LearnerGroup]:
    group = LearnerGroup(policy, TRAIN.model_copy(update={"ranks": 2}), 1.0, LocalLauncher(program=program))
    try:
        yield group
    finally:
        group.close()


@pytest.fixture(scope="module")
def bench(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    policy, start = fresh(tiny), tmp_path_factory.mktemp("start")
    batches = batches_of(policy)
    with ranks(policy) as group:
        group.save(start)
        off = steps(group, group.score, None, batches)
        yield Bench(group, policy, start, batches, off, copied(policy.model.state_dict()))


@pytest.mark.parametrize("loss", ["lk", "e2e"])
@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_losses_and_gradients_of_parts_add_up(tiny: Callable[..., Path], method: str, loss: str) -> None:
    """Of a batch in three parts: one that lacks the last positions, and one in which nothing can be drafted."""
    policy, config = fresh(tiny), CONFIG.model_copy(update={"loss": loss})
    head: Any = drafter_for(method, policy).head
    parts = [[([5, 6, 7], [4, 8, 2, 9, 1]), ([3], [7, 7, 5])], [([9, 3, 1, 2], [6, 6])], [([20], [11])]]
    lessons = [run_teacher(head, policy, pairs, 1.0) for pairs in parts]
    counts = [rows_by_position(lesson.scored, config.depth) for lesson in lessons]
    assert counts == [[7, 5, 3], [2, 1, 0], [0, 0, 0]]
    rows = [sum(at) for at in zip(*counts, strict=True)]

    def found(parts: Sequence[TeacherBatch]) -> tuple[float, Tensor]:
        head.zero_grad(set_to_none=True)
        passes = [unrolled_losses(head, policy, part, config, 1.0) for part in parts]
        total = sum(weighted_loss(each, config.decay, rows) for each in passes if each)
        assert isinstance(total, Tensor)
        total.backward()
        return float(total.detach()), torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])

    whole = run_teacher(head, policy, [pair for part in parts for pair in part], 1.0)
    assert rows_by_position(whole.scored, config.depth) == rows
    (split, gradient), (expected, reference) = found(lessons), found([whole])
    assert expected == float(weighted_loss(unrolled_losses(head, policy, whole, config, 1.0), config.decay).detach())
    assert split == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["eagle3", "mtp", "mtp, reduced"])
def test_the_drafter_is_that_of_one_process_and_the_policy_does_not_notice(
    bench: Bench, tiny: Callable[..., Path], method: str
) -> None:
    """Bit for bit: the policy's weights and metrics with and without. SGD: its weights tell its gradients."""
    expected, metrics = alone(tiny, method, bench.batches)
    trainer = bench.trainer(method)
    before = copied(trainer.head.state_dict())
    found = bench.steps(trainer, bench.batches)
    assert all(torch.equal(w, bench.weights[name]) for name, w in bench.policy.model.state_dict().items())
    for row, off in zip(found, bench.off, strict=True):
        assert {name: row[name] for name in off} == off
    assert apart(before, expected.state_dict()) > 0.5
    assert apart(trainer.head.state_dict(), expected.state_dict()) < 0.01
    assert len(found) == 3 and found[2]["draft/loss"] < found[0]["draft/loss"]
    for mine, theirs in zip(found, metrics, strict=True):
        assert mine["draft/tokens"] == theirs["draft/tokens"] > 0
        assert agree(mine, theirs, method)
    first = one_optimizer_step(bench.batches)
    _, metrics = alone(tiny, method, first)
    assert agree(bench.steps(bench.trainer(method), first)[0], metrics[0], method, first=True)


def test_rounding_alone_moves_later_gradients(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, whose teacher is off by 3e-7 of its size, two to three units in the last place of float32.

    The first optimizer step of an MTP head is off by 4e-6, the norms of later ones by 6e-4: over a hundred times as
    far, which is why `agree` allows them more. (An EAGLE-3 head's stay where they are.)
    """
    method, batches = "mtp, reduced", batches_of(fresh(tiny))
    made, source = cotrain.teacher_batch, torch.Generator().manual_seed(0)

    def rounded(*arguments: Any) -> tuple[TeacherBatch, Tensor]:
        batch, logits = made(*arguments)
        features, log_p = (
            x * (1 + 3e-7 * torch.randn(x.shape, generator=source)) for x in (batch.features, batch.log_p)
        )
        return replace(batch, features=features, log_p=log_p), logits

    def moved(batches: Sequence[Batch], first: bool) -> float:
        """How far the norms move."""
        _, exact = alone(tiny, method, batches)
        with monkeypatch.context() as patch:
            patch.setattr(cotrain, "teacher_batch", rounded)
            _, found = alone(tiny, method, batches)
        assert all(agree(a, b, method, first) for a, b in zip(found, exact, strict=True))
        return max(abs(a["draft/grad_norm"] / b["draft/grad_norm"] - 1) for a, b in zip(found, exact, strict=True))

    assert moved(batches, first=False) > 10 * moved(one_optimizer_step(batches), first=True)


def test_the_comparison_sees_rows_that_are_left_out(tiny: Callable[..., Path]) -> None:
    """The negative control: a second rank that keeps nothing."""
    policy = fresh(tiny)
    batches = batches_of(policy)[:1]
    expected, metrics = alone(tiny, "eagle3", batches)
    with ranks(policy, LEFT_OUT) as group:
        trainer = GroupCoTrainer(group, drafter_for("eagle3", policy), "every-1", CONFIG, 0)
        found = steps(group, trainer.score, trainer, batches)
    assert apart(trainer.head.state_dict(), expected.state_dict()) > 0.5
    assert not agree(found[0], metrics[0], "eagle3")


def test_what_does_not_fit_is_left_out_as_in_one_process(bench: Bench, tiny: Callable[..., Path]) -> None:
    for method, room in (("eagle3", 1e-4), ("mtp", 3e-5)):  # for two or three batches of four
        for kept in (0.0, room):
            config = CONFIG.model_copy(update={"cache_gib": kept})
            expected, metrics = alone(tiny, method, bench.batches[:1], config)
            trainer = bench.trainer(method, config)
            found = bench.steps(trainer, bench.batches[:1])
            assert metrics[0]["draft/tokens_left_out"] > 0
            assert agree(found[0], metrics[0], method)
            assert apart(trainer.head.state_dict(), expected.state_dict()) < 0.01


def test_drift_starts_updates_as_in_one_process(bench: Bench, tiny: Callable[..., Path]) -> None:
    config = CONFIG.model_copy(update={"drift_window": 1})
    rollouts, advantages = bench.batches[0]
    batches = [  # from the third step on, twice the rounds: acceptance has halved
        ([replace(r, rounds=max(1, len(r.tokens) * rounds // 4)) for r in rollouts], advantages)
        for rounds in (1, 1, 2, 2)
    ]
    expected, metrics = alone(tiny, "eagle3", batches, config, "drift")
    trainer = bench.trainer("eagle3", config, "drift")
    found = bench.steps(trainer, batches)
    assert ["draft/loss" in row for row in found] == [False, False, False, True]
    assert all(agree(a, b, "eagle3") for a, b in zip(found, metrics, strict=True))
    assert apart(trainer.head.state_dict(), expected.state_dict()) < 0.01


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_a_restored_drafter_goes_on_bit_for_bit(
    bench: Bench, tiny: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    """On ranks; one process goes on from there too, as ranks do from its checkpoint."""
    trainer = bench.trainer(method)
    bench.steps(trainer, bench.batches[:2])
    bench.group.save(tmp_path)
    torch.save(trainer.state_dict(), tmp_path / "cotrain.pt")
    saved = copied(trainer.head.state_dict())
    metrics = bench.steps(trainer, bench.batches[2:], 2)
    expected = copied(trainer.head.state_dict())
    assert apart(saved, expected) > 0.5

    again = bench.trainer(method)  # a new one, with an optimizer that has not stepped
    bench.group.restore(tmp_path)
    state = torch.load(tmp_path / "cotrain.pt", weights_only=True)
    again.load_state_dict(state)
    assert gap(again.head.state_dict(), saved) == 0
    assert bench.steps(again, bench.batches[2:], 2) == metrics and gap(again.head.state_dict(), expected) == 0

    policy = fresh(tiny)
    learner, drafter = Learner(policy, TRAIN, 1.0), drafter_for(method, policy)
    single = CoTrainer(drafter, policy, "every-1", CONFIG, 1.0, 0)
    learner.restore(tmp_path)
    single.load_state_dict(state)
    assert gap(drafter.state_dict(), saved) == 0
    assert list(single.state_dict()["optimizer"]["inner"]["state"]) == list(state["optimizer"]["inner"]["state"])
    steps(learner, lambda r: learner.score(r, single.forward), single, bench.batches[2:], 2)
    assert apart(drafter.state_dict(), expected) < 0.01


def test_a_gradient_that_is_not_finite_is_skipped_by_all_ranks(bench: Bench) -> None:
    trainer = bench.trainer("eagle3", CONFIG.model_copy(update={"decay": float("nan")}))
    before = copied(trainer.head.state_dict())
    assert bench.steps(trainer, bench.batches[:1])[0]["draft/skipped_updates"] > 0
    assert gap(trainer.head.state_dict(), before) == 0
    assert bench.steps(bench.trainer("eagle3"), bench.batches[:1])[0]["draft/tokens"] > 0  # the ranks are still at work


# ---- whole runs ----


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    drafter_for("eagle3", policy).save(tmp_path / "head", {})
    data = {
        "name": "ranks", "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "eagle3", "draft": str(tmp_path / "head"), "k": 3, "train": "every-1"},
        "draft": {"depth": 2, "online_learning_rate": 1e-3},
        "rollout": {"slots": 8, "max_new_tokens": 12},
        "train": {"steps": 2, "prompts_per_step": 3, "samples_per_prompt": 4, "learning_rate": 1e-3, "ranks": 2},
        "eval": {"prompts": 0}, "checkpoint": {"every": 1},
    }  # fmt: skip
    path = tmp_path / "ranks.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def steps_of(folder: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "perf/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if "reward/mean" in row]


@pytest.mark.slow
@pytest.mark.usefixtures("real_workers")
def test_a_run_with_ranks_publishes_what_they_trained_and_survives_the_loss_of_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second step's draft training, it ends with policy and drafter of an undisturbed run."""
    trained: list[str] = []
    published: dict[int, dict[str, str]] = {}
    compare, pack_weights, study = LearnerGroup.check_drafters, state.pack_weights, LearnerGroup.train_drafter

    def compared(self: LearnerGroup, held: Sequence[str], received: str) -> None:
        compare(self, held, received)
        assert len(held) == 2
        trained.append(received)

    def recorded(version: int, *arguments: Any, **keywords: Any) -> Any:
        weights = pack_weights(version, *arguments, **keywords)
        published[version] = dict(weights.checksums)
        return weights

    monkeypatch.setattr(LearnerGroup, "check_drafters", compared)
    monkeypatch.setattr(state, "pack_weights", recorded)
    monkeypatch.setattr(runs, "pack_weights", recorded)  # the last version, for the summary
    undisturbed = forerun.train(str(recipe))
    rows = steps_of(undisturbed["run"])
    assert len(rows) == len(trained) == 2 and all(row["draft/tokens"] > 0 for row in rows)
    assert [published[1]["draft"], published[2]["draft"]] == trained
    assert len({published[version]["draft"] for version in range(3)}) == 3
    assert undisturbed["weights"]["draft_checksum"] == trained[1]

    calls: list[int] = []

    def killing(self: LearnerGroup, head: Any) -> Any:
        calls.append(len(self.pids))
        if len(calls) == 2:
            os.kill(self.pids[1], signal.SIGKILL)
        return study(self, head)

    monkeypatch.setattr(LearnerGroup, "train_drafter", killing)
    summary = forerun.train(str(recipe))
    assert calls == [2, 2, 2]  # the second step's twice
    (warning,) = (words for words in summary["warnings"] if "goes back" in words)
    assert "goes back to step-000001" in warning and "Rank 1 of the learner" in warning
    assert summary["weights"] == undisturbed["weights"] and steps_of(summary["run"]) == rows
