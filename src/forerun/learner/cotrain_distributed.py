"""Co-training over the ranks of a sharded learner, on the side of the driver; and which co-trainer a recipe asks for.

Batches, their order and what fits into memory are decided here, before the logprob stage, as one process would decide
them; each rank gets its rows of each. So the drafter is that of one process, up to the order of float32 sums. The ranks
train it (`cotrain_worker.py`); its weights are streamed into the driver's drafter, which drafts, is published and
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
from forerun.events import CountStream
from forerun.learner.cotrain import (
    CacheWarning,
    CoTrainer,
    Schedule,
    draft_metrics,
    nothing,
    order_of_batches,
    trained_head,
)
from forerun.learner.distributed import LearnerGroup
from forerun.learner.learner import Learner
from forerun.learner.objective import Scored
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.models.logprobs import microbatches
from forerun.types import Rollout

Score = Callable[[Sequence[Rollout]], CountStream[Scored]]
Order = Callable[[int], list[int]]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The batches of an update, chosen before the logprob stage."""

    batches: list[list[int]]  # rollouts of each optimizer step
    tokens: int = 0  # completion tokens in them
    left_out: int = 0  # completion tokens for which there is no memory
    smallest_bytes: int = 0  # of a micro-batch


def plan_batches(
    head: TrainableHead,
    dtype: torch.dtype,
    rollouts: Sequence[Rollout],
    microbatch_tokens: int,
    gib: float,
    order: Order,
) -> BatchPlan:
    """The batches that `CoTrainer` keeps when one process scores these rollouts, in the order of its update.

    Args:
        dtype: of the policy. order: of so many batches.
    """
    lengths = [len(r.prompt_ids) + len(r.tokens) for r in rollouts]
    kept: list[list[int]] = []
    room_bytes, tokens, left_out = int(gib * 2**30), 0, 0
    sizes: list[int] = []
    for batch in microbatches(lengths, microbatch_tokens):
        size = len(batch) * max(lengths[i] for i in batch) * place_bytes(head, dtype)
        scored = sum(len(rollouts[i].tokens) for i in batch)
        sizes.append(size)
        if size <= room_bytes:
            room_bytes, tokens = room_bytes - size, tokens + scored
            kept.append(batch)
        else:
            left_out += scored
    return BatchPlan([kept[index] for index in order(len(kept))], tokens, left_out, min(sizes, default=0))


class GroupCoTrainer:
    """`CoTrainer`, over the ranks of a group."""

    def __init__(
        self,
        group: LearnerGroup,
        drafter: Drafter,
        train: str,
        config: DraftConfig,
        seed: int,
        warn: Callable[[str], None] = nothing,
    ) -> None:
        """Give every rank the drafter. `train` is `speculation.train`: every-N or drift. `warn`: see `CacheWarning`.

        Raises:
            UserError: drafters of its kind cannot be co-trained. RanksLost.
        """
        self.head = trained_head(drafter, train)
        self.group = group
        self.config = config
        self.seed = seed
        self.schedule = Schedule(train, config)
        self.plan = BatchPlan([])
        self._warning = CacheWarning(config.cache_gib, warn)
        self._step: int | None = None  # that ends with an update
        group.add_drafter(self.head.detached(), config)

    def begin(self, step: int) -> None:
        """A step (0-based) begins; this decides whether it ends with an update."""
        self._step = step if self.schedule.due(step) else None

    def score(self, rollouts: Sequence[Rollout]) -> CountStream[Scored]:
        """`LearnerGroup.score`; the ranks cache the teacher batches of an update that is due."""
        self.plan = BatchPlan([])
        if self._step is not None:
            order = partial(order_of_batches, self.seed, self._step)
            tokens, dtype = self.group.config.microbatch_tokens, self.group.policy.dtype
            self.plan = plan_batches(self.head, dtype, rollouts, tokens, self.config.cache_gib, order)
        return self.group.score(rollouts, self.plan.batches)

    def update(self, step: int, rollouts: Sequence[Rollout], entropies: Sequence[float]) -> dict[str, float]:
        """See `CoTrainer.update`. Raises RanksLost too, also when the ranks' drafters are no longer the same."""
        metrics = {} if self._step is None else self._update()
        return metrics | self.schedule.observe(rollouts, entropies)

    def _update(self) -> dict[str, float]:
        started = time.perf_counter()
        if not self.plan.batches:
            if self.plan.left_out:
                self._warning.give(self.plan.smallest_bytes)
            return draft_metrics([], [], [], 0, self.plan.left_out, started)
        updates = self.group.train_drafter(self.head)
        self.group.check_drafters([update.checksum for update in updates], checksum(self.head.state_dict()))
        updates = updates[:: self.group.config.tensor_parallel]  # one of the ranks that ran the same rows
        losses = [sum(parts) for parts in zip(*(update.losses for update in updates), strict=True)]
        by_batch = [batch for update in updates for batch in update.position_losses]
        return draft_metrics(losses, updates[0].norms, by_batch, self.plan.tokens, self.plan.left_out, started)

    def state_dict(self) -> dict[str, Any]:
        """See `CoTrainer.state_dict`. Raises UserError, RanksLost."""
        return {"optimizer": self.group.draft_optimizer(), "drift": self.schedule.meter.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, also of `CoTrainer`'s; the drafter follows. Raises UserError, RanksLost."""
        self.group.set_draft_optimizer(state["optimizer"], self.head)
        self.schedule.meter.load_state_dict(state["drift"])


def build_cotrainer(
    learner: Learner | LearnerGroup,
    policy: Policy,
    drafter: Drafter | None,
    recipe: Recipe,
    warn: Callable[[str], None],
) -> tuple[CoTrainer | GroupCoTrainer | None, Score]:
    """What trains the drafter (None: nothing does), and what scores rollouts so that it sees their forward.

    Raises:
        UserError: drafters of its kind cannot be co-trained. RanksLost. The learner is closed.
    """
    train, config, seed = recipe.speculation.train, recipe.draft, recipe.seed
    if drafter is None or train == "off":
        return None, learner.score
    try:
        if isinstance(learner, LearnerGroup):
            over_ranks = GroupCoTrainer(learner, drafter, train, config, seed, warn)
            return over_ranks, over_ranks.score
        trainer = CoTrainer(drafter, policy, train, config, recipe.rollout.temperature, seed, warn)
    except BaseException:
        learner.close()
        raise
    return trainer, partial(learner.score, forward=trainer.forward)
