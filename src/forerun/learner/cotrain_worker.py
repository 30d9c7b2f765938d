"""Co-training on one rank of a sharded learner. The driver's side: `cotrain_distributed.py`.

Every rank holds the whole drafter and its optimizer. In the logprob stage it caches the teacher outputs of its rows. In
an update it computes the loss of its rows of every batch, divided by the rows of the whole batch on all ranks;
gradients are summed over the ranks, and all take the same optimizer step: that of one process, up to the order of
float32 sums. What the drafter uses of the policy (embedding, output head) is gathered once per update. All ranks must
call in the same order. Not supported: a drafter that is itself sharded.
Axes: l tokens of a row, H hidden, T auxiliary layers, D draft vocabulary, J depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from forerun.config import DraftConfig, TrainConfig
from forerun.drafters.trainable import TeacherBatch, TrainableHead
from forerun.drafters.training.heads import (
    PositionLoss,
    rows_by_position,
    teacher_batch,
    unrolled_losses,
    weighted_loss,
)
from forerun.learner.cotrain import draft_optimizer, draft_step
from forerun.learner.parallel import whole
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.models.logprobs import TokenBatch, completion_logits, microbatches
from forerun.types import Rollout

Row = tuple[Tensor, Tensor, Tensor, Tensor]  # of a TeacherBatch: [l], [l, T·H], [l, D], [l]


@dataclass(slots=True)
class RankUpdate:
    """A rank's result of an update."""

    losses: list[float] = field(default_factory=list)  # its part of each optimizer step's
    norms: list[float] = field(default_factory=list)  # the same on every rank
    position_losses: list[list[PositionLoss]] = field(default_factory=list)  # of its own rows
    checksum: str = ""  # of the drafter


class RankCoTrainer:
    """The drafter on one rank."""

    def __init__(
        self,
        head: TrainableHead,
        policy: Policy,
        dtype: torch.dtype,
        config: DraftConfig,
        train: TrainConfig,
        temperature: float,
    ) -> None:
        """`head` may be `detached`; `policy` is this rank's part, run in `dtype`; `temperature` is the rollouts'."""
        self.policy = policy
        self.dtype = dtype
        self.config = config
        self.temperature = temperature
        self.microbatch_tokens = train.microbatch_tokens
        self.copies = train.tensor_parallel
        self.head = head
        head.attach(policy)
        self.optimizer = draft_optimizer(self.head, config)
        self.batches: Sequence[Sequence[int]] = []
        self.rows: dict[int, Row] = {}  # by number of the rollout

    def caching_forward(
        self, rollouts: Sequence[Rollout], batches: Sequence[Sequence[int]]
    ) -> Callable[[Any, TokenBatch], Tensor]:
        """`completion_logits` for `Learner.score` of these rollouts, which caches their teacher outputs.

        Args:
            batches: which rollouts of this rank are in each of the update's batches; empty: no update is due.
        """
        self.batches, self.rows = batches, {}
        lengths = [len(r.prompt_ids) + len(r.tokens) for r in rollouts]
        wanted = {i for batch in batches for i in batch}
        passes = iter(microbatches(lengths, self.microbatch_tokens))  # as the learner makes them; then empty ones

        def forward(model: Any, batch: TokenBatch) -> Tensor:
            here = next(passes, [])
            if wanted.isdisjoint(here):
                return completion_logits(model, batch)
            teacher, logits = teacher_batch(self.head, model, batch, self.temperature)
            self.rows |= {i: _row(teacher, n, lengths[i]) for n, i in enumerate(here) if i in wanted}
            return logits

        return forward

    def train(self, tick: Callable[[], None]) -> RankUpdate:
        """The update on the cached rows. `tick`: called after every optimizer step."""
        try:
            with self._gathered_policy():
                assert self.policy.dtype == self.dtype  # the dtype that the losses are computed in
                result = RankUpdate()
                for batch, rows in zip(self.batches, self._rows_of_batches(), strict=True):
                    if rows:
                        self._train_on(batch, rows, result)
                    tick()
        finally:
            self.batches, self.rows = [], {}
        result.checksum = checksum(self.head.state_dict())
        return result

    @contextmanager
    def _gathered_policy(self) -> Iterator[None]:
        """Gather what the drafter uses of the policy: the unit of embedding, final norm and output head."""
        model, head = self.policy.model, self.head
        model.unshard()
        try:
            if self.copies > 1:
                head.gather_shared(whole)
            yield
        finally:
            head.attach(self.policy)
            model.reshard()

    def _rows_of_batches(self) -> list[list[int]]:
        """Rows of each draft position in each batch, on all ranks; positions without any are left out."""
        own = torch.zeros(len(self.batches), self.config.depth, dtype=torch.int64)  # [batches, J]
        for number, batch in enumerate(self.batches):
            for i in batch:
                own[number] += torch.tensor(rows_by_position(self.rows[i][3][None], self.config.depth))
        dist.all_reduce(own)
        return [[n for n in rows if n] for rows in (own // self.copies).tolist()]

    def _train_on(self, batch: Sequence[int], rows: Sequence[int], result: RankUpdate) -> None:
        """One optimizer step on this rank's rollouts of a batch, possibly none, and the other ranks' of it."""
        positions: list[PositionLoss] = []
        if batch:
            parts_of_rows = zip(*(self.rows[i] for i in batch), strict=True)
            teacher = TeacherBatch(*(pad_sequence(list(parts), batch_first=True) for parts in parts_of_rows))
            positions = unrolled_losses(self.head, self.policy, teacher, self.config, self.temperature)
        loss = 0.0
        if positions:
            part = weighted_loss(positions, self.config.decay, rows)
            part.backward()
            loss = float(part.detach())
            result.position_losses.append([PositionLoss(p.loss.detach().cpu(), p.accepted, p.rows) for p in positions])
        sum_gradients(self.optimizer.masters, self.copies)
        result.norms.append(draft_step(self.optimizer, self.config.online_learning_rate))
        result.losses.append(loss)


def _row(teacher: TeacherBatch, n: int, length: int) -> Row:
    """Row n without its padding, nor the storage of the others."""
    tokens, features, log_p, scored = (
        x[n, :length].clone() for x in (teacher.tokens, teacher.features, teacher.log_p, teacher.scored)
    )
    return tokens, features, log_p, scored


def sum_gradients(masters: Sequence[nn.Parameter], copies: int) -> None:
    """Sum the gradients over the ranks, `copies` of which ran the same rows. What has none on any rank keeps none."""
    anywhere = torch.tensor([int(m.grad is not None) for m in masters])
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    for master, has in zip(masters, anywhere.tolist(), strict=True):
        if has:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
            dist.all_reduce(master.grad)
            if copies > 1:
                master.grad.div_(copies)
