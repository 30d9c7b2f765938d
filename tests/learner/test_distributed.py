"""A sharded learner makes the updates of one process, goes on from checkpoints, and is not survived by its processes.

float32: sums come in another order, and the second of two optimizer steps begins where that has led: log-probabilities,
losses, norms and weights (of the largest change) agree within 2e-4 of their size, 1e-5 where they are near 0; 6e-5 was
seen, and the negative control is 0.5 off. SGD, whose step is as wrong as its gradient is; AdamW, which turns any small
gradient into a full step, where the same ranks must repeat themselves bit for bit.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forerun.algorithms.advantages import group_advantages
from forerun.config import TrainConfig
from forerun.engine.local.engine import LocalEngine
from forerun.errors import Interrupted, UserError
from forerun.events import CountStream, finish
from forerun.learner.distributed import LearnerGroup
from forerun.learner.learner import Learner
from forerun.models import Policy, load_policy
from forerun.types import Rollout
from forerun.workers.group import RanksLost
from forerun.workers.local import LocalLauncher
from forerun.workers.server import PROGRAM

pytestmark = pytest.mark.usefixtures("forked_workers")
PROMPTS = [[5, 6, 7], [9, 3, 1, 2, 4, 4], [20, 21]]
REWARDS = [[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]]  # the second group has zero advantages
AVERAGING = f"import forerun.learner.fsdp as shard; shard.DIVISOR = 2.0; {PROGRAM}"
SGD = {"optimizer": "sgd", "max_grad_norm": 1e3, "microbatch_tokens": 40, "updates_per_step": 2, "silence_s": 20}
PLAIN = TrainConfig(**SGD)
RICH = TrainConfig(**SGD | {"kl": 0.3, "packing": True, "gradient_checkpointing": True})
Batch = tuple[list[Rollout], Tensor]


@pytest.fixture
def fresh(tiny: Callable[..., Path]) -> Callable[[], Policy]:
    """Makes policies with the same weights; these tests train them."""
    return lambda: load_policy(str(tiny("llama", tie_word_embeddings=True)), "float32", "cpu")


@pytest.fixture
def batches(fresh: Callable[[], Policy]) -> list[Batch]:
    """Twelve rollouts, and two: fewer than there are ranks."""
    rollouts = LocalEngine(fresh(), slots=8).generate(PROMPTS, max_new_tokens=12, n=4, seed=1)
    advantages = group_advantages(torch.tensor(REWARDS)).view(-1)
    return [(rollouts, advantages), (rollouts[:2], advantages[:2])]


@dataclass
class Outcome:
    """Of some steps."""

    logprobs: list[Tensor] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def differs_from(self, other: Outcome, start: dict[str, Tensor]) -> dict[str, float]:
        """Largest differences, each in units of what may be: above 1 is another update."""
        found = {"logprobs": max(gap(x, y) for x, y in zip(self.logprobs, other.logprobs, strict=True))}
        for mine, theirs in zip(self.metrics, other.metrics, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                found[name] = max(found.get(name, 0.0), gap(torch.tensor(value), torch.tensor(theirs[name])))
        moved = max(float((w - start[name]).abs().max()) for name, w in other.weights.items())
        worst = max(float((w - other.weights[name]).abs().max()) for name, w in self.weights.items())
        return found | {"weights": worst / (2e-4 * moved)}


def gap(x: Tensor, y: Tensor) -> float:
    return float(((x - y).abs() / (1e-5 + 2e-4 * y.abs())).max())


def steps(learner: Learner | LearnerGroup, batches: list[Batch], rate: float = 0.01) -> Outcome:
    outcome = Outcome()
    for rollouts, advantages in batches:
        scored = finish(learner.score(rollouts))
        outcome.logprobs += [torch.cat(scored.logprobs), torch.tensor(scored.entropies)]
        outcome.logprobs += [] if scored.reference is None else [torch.cat(scored.reference)]
        outcome.metrics.append(finish(learner.update(rollouts, advantages, scored, rate)))
    outcome.weights = weights(learner.policy)
    return outcome


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def ranks(policy: Policy, count: int, config: TrainConfig, program: str = PROGRAM) -> Iterator[LearnerGroup]:
    group = LearnerGroup(policy, config.model_copy(update={"ranks": count}), 1.0, LocalLauncher(program=program))
    try:
        assert len(group.pids) == count
        yield group
    finally:
        group.close()


def alive(pids: list[int]) -> list[int]:
    def lives(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    return [pid for pid in pids if lives(pid)]


def updates_that_do_not_happen(group: LearnerGroup, batch: Batch) -> None:
    """One that is stopped before it begins, one in its midst, one whose gradient is not finite: nothing changes."""
    rollouts, advantages = batch
    before, scored, last = weights(group.policy), finish(group.score(rollouts)), group.pids[-1]
    with pytest.raises(Interrupted):
        finish(group.update(rollouts, advantages, scored, 0.05, stop_requested=lambda: True))
    asked: list[bool] = []

    def stop() -> bool:  # not before it begins
        asked.append(True)
        if len(asked) == 2:
            threading.Timer(1.0, os.kill, (last, signal.SIGCONT)).start()
        return len(asked) > 1

    os.kill(last, signal.SIGSTOP)  # so that the ranks cannot be done before they are asked to stop
    with pytest.raises(Interrupted):
        finish(group.update(rollouts, advantages, scored, 0.05, stop))
    skipped = finish(group.update(rollouts, advantages * float("inf"), scored, 0.05))
    assert skipped["policy/skipped_updates"] > 0 and "not finite are the advantages" in group.objective.skip_reason
    assert same(weights(group.policy), before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_ranks_makes_the_update_of_one_process(
    fresh: Callable[[], Policy], batches: list[Batch], count: int
) -> None:
    start = weights(fresh())
    expected = steps(Learner(fresh(), PLAIN, 1.0), batches)
    assert expected.metrics[0]["policy/grad_norm"] > 0.1 and abs(expected.metrics[0]["policy/loss"]) > 1e-4
    with ranks(fresh(), count, PLAIN) as group:
        updates_that_do_not_happen(group, batches[0])
        done = list(group.score(batches[0][0]))
        found = steps(group, batches)
    assert done[-1] == 12 and done == sorted(done)
    differences = found.differs_from(expected, start)
    assert max(differences.values()) < 1, differences
    assert alive(group.pids) == []


def test_reference_packing_and_checkpointing_over_ranks(fresh: Callable[[], Policy], batches: list[Batch]) -> None:
    """With a reference, rollouts of zero advantage are run too."""
    start, expected = weights(fresh()), steps(Learner(fresh(), RICH, 1.0), batches)
    assert expected.metrics[1]["policy/kl"] > 1e-6
    with ranks(fresh(), 2, RICH) as group:
        found = steps(group, batches)
    differences = found.differs_from(expected, start)
    assert max(differences.values()) < 1, differences


@pytest.mark.parametrize("algorithm", ["dr_grpo", "gspo"])
def test_other_algorithms_over_ranks(fresh: Callable[[], Policy], batches: list[Batch], algorithm: str) -> None:
    """Two optimizer steps, the second of which is clipped."""
    config = PLAIN.model_copy(update={"algorithm": algorithm, "clip_low": 0.01, "clip_high": 0.01})
    start, expected = weights(fresh()), steps(Learner(fresh(), config, 1.0), batches, 0.1)
    assert expected.metrics[0]["policy/clip_low"] + expected.metrics[0]["policy/clip_high"] > 0
    with ranks(fresh(), 2, config) as group:
        found = steps(group, batches, 0.1)
    differences = found.differs_from(expected, start)
    assert max(differences.values()) < 1, differences


def test_bfloat16_is_trained_through_float32_masters(tiny: Callable[..., Path], batches: list[Batch]) -> None:
    """What is streamed out is what the ranks compute with: one process scores with it as they do."""
    policy = load_policy(str(tiny("llama", tie_word_embeddings=True)), "bfloat16", "cpu")
    start, config = weights(policy), TrainConfig(optimizer="sgd", max_grad_norm=1e3, silence_s=20)
    rollouts, advantages = batches[0]
    with ranks(policy, 2, config) as group:
        before = finish(group.score(rollouts))
        for _ in range(3):
            finish(group.update(rollouts, advantages, before, 0.2))
        after = torch.cat(finish(group.score(rollouts)).logprobs)
    assert policy.dtype == torch.bfloat16 and not same(weights(policy), start)
    alone = torch.cat(finish(Learner(policy, config, 1.0).score(rollouts)).logprobs)
    rounding, moved = (after - alone).abs().mean(), (after - torch.cat(before.logprobs)).abs().mean()
    assert float(moved) > 5 * float(rounding)


def test_the_comparison_sees_gradients_that_are_averaged(fresh: Callable[[], Policy], batches: list[Batch]) -> None:
    """The negative control: half the gradient is seen in the norm and in the weights, and the scores are right."""
    start, expected = weights(fresh()), steps(Learner(fresh(), PLAIN, 1.0), batches[:1])
    with ranks(fresh(), 2, PLAIN, AVERAGING) as group:
        differences = steps(group, batches[:1]).differs_from(expected, start)
    assert differences["logprobs"] < 1 < 500 < min(differences["weights"], differences["policy/grad_norm"])


@pytest.mark.slow
@pytest.mark.usefixtures("real_workers")
def test_a_restored_group_goes_on_bit_for_bit(
    fresh: Callable[[], Policy], batches: list[Batch], tmp_path: Path
) -> None:
    """From its own checkpoint; and from that of one process that had read it: two ranks, one, two again.

    At its end the driver's death is played, with a rank that is stopped: no process is left.
    """
    config = TrainConfig(kl=0.1, silence_s=20)
    for name in ("ranks", "process"):
        (tmp_path / name).mkdir()
    with ranks(fresh(), 2, config) as group:
        steps(group, batches, 1e-3)
        group.save(tmp_path / "ranks")
        saved = weights(group.policy)
        expected = steps(group, batches, 1e-3)
        assert not same(expected.weights, saved)
        group.restore(tmp_path / "ranks")
        assert same(weights(group.policy), saved)
        again = steps(group, batches, 1e-3)
        assert same(again.weights, expected.weights) and again.metrics == expected.metrics

        policy = fresh()
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                parameter.copy_(saved[name])
        alone = Learner(policy, config, 1.0)  # its reference is the policy of now, until it is restored
        alone.restore(tmp_path / "ranks")
        assert same(weights(policy), saved) and alone.optimizer.updates == 2
        alone.save(tmp_path / "process")
        metrics = steps(alone, batches[:1], 1e-3).metrics[0]
        assert metrics["policy/kl"] == pytest.approx(expected.metrics[0]["policy/kl"], rel=1e-3)
        group.restore(tmp_path / "process")
        assert same(steps(group, batches, 1e-3).weights, expected.weights)
        with pytest.raises(UserError, match="cannot be loaded"):
            group.restore(tmp_path / "nowhere")
        assert len(finish(group.score(batches[1][0])).logprobs) == 2  # and is still at work

        os.kill(group.pids[1], signal.SIGSTOP)
        group._ranks._launcher.close()  # its thread ends, as all threads of a driver do that dies
        assert all(worker.process.end(20) == "was killed by signal 9" for worker in group._ranks._workers)


@pytest.mark.parametrize("stage", ["score", "train"])
def test_a_killed_rank_ends_the_group(fresh: Callable[[], Policy], batches: list[Batch], stage: str) -> None:
    (rollouts, advantages), config = batches[0], TrainConfig(microbatch_tokens=1, silence_s=20)
    with ranks(fresh(), 2, config) as group:
        scored = finish(group.score(rollouts))
        killed: list[float] = []

        work: CountStream[Any] = (
            group.score(rollouts) if stage == "score" else group.update(rollouts, advantages, scored, 1e-3)
        )
        os.kill(group.pids[1], signal.SIGSTOP)  # so that it cannot be done before it is killed
        with pytest.raises(RanksLost, match="Rank 1 of the learner was killed by signal 9"):
            for _ in work:
                if not killed:
                    killed.append(time.monotonic())
                    os.kill(group.pids[1], signal.SIGKILL)
        assert time.monotonic() - killed[0] < 20 and alive(group.pids) == []
        with pytest.raises(RanksLost, match="start new ones"):
            finish(group.score(rollouts))


def test_a_rank_that_hangs_ends_the_group(fresh: Callable[[], Policy], batches: list[Batch]) -> None:
    with ranks(fresh(), 2, TrainConfig(silence_s=4)) as group:
        os.kill(group.pids[1], signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RanksLost, match="Rank 1 of the learner has been silent for 4 s; all 2 were ended"):
            finish(group.score(batches[0][0]))
        assert time.monotonic() - started < 30 and alive(group.pids) == []


@pytest.mark.usefixtures("real_workers")
def test_a_rank_that_cannot_start_says_why(fresh: Callable[[], Policy]) -> None:
    with pytest.raises(RanksLost, match=r"Rank \d of the learner .*ModuleNotFoundError: No module named 'nowhere'"):
        LearnerGroup(fresh(), TrainConfig(ranks=2), 1.0, LocalLauncher(program="import nowhere"))
