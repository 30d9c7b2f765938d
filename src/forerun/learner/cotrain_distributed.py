"""The drafter trains beside a policy that is sharded over ranks: the parent's end, and who trains it at all.

Batches, their order and what memory allows are settled here, before the logprob stage, as one process would settle
them, and each rank is told its rows of each: the drafter is that of one process, up to the order of float32 sums. The
ranks train it (`cotrain_worker.py`); its weights are streamed into the parent's drafter, which drafts, is published and
saved, and whose checksum must be that of every rank. Checkpoints are those of `CoTrainer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from forerun.config import DraftConfig, Recipe
from forerun.drafters import Drafter
from forerun.drafters.trainable import TrainableHead
from forerun.drafters.training.heads import place_bytes
from forerun.events import Counting
from forerun.learner.cotrain import CoTrainer, Schedule, draft_metrics, order_of_batches, trained_head
from forerun.learner.distributed import LearnerGroup
from forerun.learner.learner import Learner
from forerun.learner.objective import Scored
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.models.logprobs import microbatches
from forerun.types import Rollout

Score = Callable[[Sequence[Rollout]], Counting[Scored]]
Order = Callable[[int], list[int]]


@dataclass(frozen=True, slots=True)
class Course:
    """What an update is made of, settled before the logprob stage."""

    batches: list[list[int]]  # rollouts of each optimizer step
    tokens: int = 0  # completion tokens in them
    left_out: int = 0  # completion tokens for which there is no memory


def plan_course(
    head: TrainableHead,
    dtype: torch.dtype,
    rollouts: Sequence[Rollout],
    microbatch_tokens: int,
    gib: float,
    order: Order,
) -> Course:
    """The batches that `CoTrainer` keeps when one process scores these rollouts, in the order of its update.

    Args:
        dtype: of the policy. order: of so many batches.
    """
    lengths = [len(r.prompt_ids) + len(r.tokens) for r in rollouts]
    kept: list[list[int]] = []
    room_bytes, tokens, left_out = int(gib * 2**30), 0, 0
    for batch in microbatches(lengths, microbatch_tokens):
        size = len(batch) * max(lengths[i] for i in batch) * place_bytes(head, dtype)
        scored = sum(len(rollouts[i].tokens) for i in batch)
        if size <= room_bytes or not kept:
            room_bytes, tokens = room_bytes - size, tokens + scored
            kept.append(batch)
        else:
            left_out += scored
    return Course([kept[index] for index in order(len(kept))], tokens, left_out)


class GroupCoTrainer:
    """`CoTrainer`, over the ranks of a group."""

    def __init__(self, group: LearnerGroup, drafter: Drafter, train: str, config: DraftConfig, seed: int) -> None:
        """Give every rank the drafter. `train` is `speculation.train`: every-N or drift.

        Raises:
            UserError: the drafter is of a kind that cannot train beside the policy. RanksLost.
        """
        self.head, self.group, self.config, self.seed = trained_head(drafter, train), group, config, seed
        self.schedule, self.course = Schedule(train, config), Course([])
        self._step: int | None = None  # that ends with an update
        group.enrol(self.head.detached(), config)

    def begin(self, step: int) -> None:
        """A step (0-based) begins; whether it ends with an update is settled here."""
        self._step = step if self.schedule.due(step) else None

    def score(self, rollouts: Sequence[Rollout]) -> Counting[Scored]:
        """`LearnerGroup.score`; the ranks keep what it teaches when an update is due."""
        self.course = Course([])
        if self._step is not None:
            order = partial(order_of_batches, self.seed, self._step)
            tokens, dtype = self.group.config.microbatch_tokens, self.group.policy.dtype
            self.course = plan_course(self.head, dtype, rollouts, tokens, self.config.cache_gib, order)
        return self.group.score(rollouts, self.course.batches)

    def train(self, step: int, rollouts: Sequence[Rollout], entropies: Sequence[float]) -> dict[str, float]:
        """See `CoTrainer.train`. Raises RanksLost too, also when the ranks' drafters are no longer the same."""
        metrics = {} if self._step is None else self._update()
        return metrics | self.schedule.look(rollouts, entropies)

    def _update(self) -> dict[str, float]:
        started = time.perf_counter()
        taught = self.group.study(self.head)
        self.group.compare([t.checksum for t in taught], checksum(self.head.state_dict()))
        taught = taught[:: self.group.config.tensor_parallel]  # who speaks for rows that several ranks ran
        losses = [sum(parts) for parts in zip(*(t.losses for t in taught), strict=True)]
        judged = [passes for t in taught for passes in t.judged]
        return draft_metrics(losses, taught[0].norms, judged, self.course.tokens, self.course.left_out, started)

    def state_dict(self) -> dict[str, Any]:
        """See `CoTrainer.state_dict`. Raises UserError, RanksLost."""
        return {"optimizer": self.group.draft_optimizer(), "drift": self.schedule.meter.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, also of `CoTrainer`'s; the drafter follows. Raises UserError, RanksLost."""
        self.group.set_draft_optimizer(state["optimizer"], self.head)
        self.schedule.meter.load_state_dict(state["drift"])


def beside(
    learner: Learner | LearnerGroup, policy: Policy, drafter: Drafter | None, recipe: Recipe
) -> tuple[CoTrainer | GroupCoTrainer | None, Score]:
    """What trains the drafter beside `learner`, None if nothing does; and what scores rollouts so that it sees them.

    Raises:
        UserError: the drafter is of a kind that cannot train beside the policy. RanksLost. The learner is closed.
    """
    train, config, seed = recipe.speculation.train, recipe.draft, recipe.seed
    if drafter is None or train == "off":
        return None, learner.score
    try:
        if isinstance(learner, LearnerGroup):
            over_ranks = GroupCoTrainer(learner, drafter, train, config, seed)
            return over_ranks, over_ranks.score
        trainer = CoTrainer(drafter, policy, train, config, recipe.rollout.temperature, seed)
    except BaseException:
        learner.close()
        raise
    return trainer, partial(learner.score, forward=trainer.forward)
