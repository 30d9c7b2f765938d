"""Training a `TrainableHead` on the policy's own rollouts, by training-time test.

In an engine the head's second draft reads its own first output, not the policy's hidden state. So pass j of J is fed
with pass j-1's outputs and compared with the policy's distribution at position t+1+j; its query at t sees the true text
up to t and its own guesses (keys of passes 1..j at t). Where a head drafts the whole vocabulary, the policy's last
hidden states are kept in place of its distributions, which are computed a few rows at a time.
Axes: N sequences, L padded length, T base positions, J depth, H hidden, D draft vocabulary, M rows of a position.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forerun.config import DraftConfig
from forerun.drafters.trainable import TeacherBatch, TrainableHead
from forerun.drafters.training.losses import position_loss
from forerun.drafters.training.trainer import Pair, Training, TrainingSetup, Validation, fit
from forerun.models import Policy
from forerun.models.auxiliary import AuxiliaryStates
from forerun.models.logprobs import TokenBatch, completion_logits, microbatches, token_batch

ROWS = 512  # full-vocabulary distributions that are held at once


@dataclass(frozen=True, slots=True)
class PositionLoss:
    """One draft position of an unrolled batch."""

    loss: Tensor  # mean over its rows
    accepted: float  # sum over its rows of the probability that the draft is accepted
    rows: int

    def detached(self) -> PositionLoss:
        """Without its graph."""
        return PositionLoss(self.loss.detach(), self.accepted, self.rows)


class TeacherCache:
    """Keeps teacher batches while they fit; beyond the bound the policy runs again every epoch."""

    def __init__(self, gib: float) -> None:
        self.room_bytes = int(gib * 2**30)
        self.kept: dict[tuple[int, ...], TeacherBatch] = {}

    def __call__(self, rows: tuple[int, ...], make: Callable[[], TeacherBatch]) -> TeacherBatch:
        if rows in self.kept:
            return self.kept[rows]
        batch = make()
        if batch.size_bytes <= self.room_bytes:
            self.room_bytes -= batch.size_bytes
            self.kept[rows] = batch
        return batch


def frequent_tokens(pairs: Sequence[Pair], most: int) -> Tensor:
    """The tokens that the completions use, at most `most`, the most frequent first; ascending ids. [D] int64"""
    counts = Counter(token for _, completion in pairs for token in completion)
    return torch.tensor(sorted(token for token, _ in counts.most_common(most)))


def train_head(head: TrainableHead, policy: Policy, setup: TrainingSetup) -> Training[Validation]:
    """Train `head` in place, see `fit`."""
    config, temperature, rng = setup.config, setup.temperature, random.Random(setup.seed)
    held, training = split_pairs(setup.pairs, config.validation, rng)
    cache = TeacherCache(config.cache_gib)

    def backward(rows: list[int]) -> float:
        teacher = cache(tuple(rows), partial(run_teacher, head, policy, [training[i] for i in rows], temperature))
        positions = unrolled_losses(head, policy, teacher, config, temperature)
        if not positions:  # only texts too short to be drafted in
            return 0.0
        loss = weighted_loss(positions, config.decay)
        loss.backward()
        return float(loss.detach())

    batches = microbatches([len(p) + len(c) for p, c in training], config.batch_tokens)
    validation = partial(validate, head, policy, held, config, temperature)
    return (yield from fit(head, batches, setup, rng, backward, validation))


@torch.no_grad()
def run_teacher(head: TrainableHead, policy: Policy, pairs: Sequence[Pair], temperature: float) -> TeacherBatch:
    """Run the policy once over prompts and completions."""
    return teacher_batch(head, policy.model, token_batch(pairs, policy.device), temperature)[0]


@torch.no_grad()
def teacher_batch(
    head: TrainableHead, model: Any, batch: TokenBatch, temperature: float
) -> tuple[TeacherBatch, Tensor]:
    """The teacher batch of one forward of the policy, and its logits [M, V] of the completion tokens."""
    with AuxiliaryStates(model, head.config.layers) as aux_layers:
        logits = completion_logits(model, batch)
    features = aux_layers.features()
    assert features is not None
    scored = torch.zeros(batch.input_ids.shape, dtype=torch.bool, device=logits.device)
    scored[batch.rows, batch.columns] = True
    if head.drafts_all_tokens:
        log_p = features.new_zeros(*batch.input_ids.shape, 0)
        return TeacherBatch(batch.input_ids, features, log_p, scored), logits
    scaled = logits.float() / (temperature or 1.0)
    inside = scaled[:, head.vocabulary] - torch.logsumexp(scaled, dim=-1, keepdim=True)  # [M, D]
    log_p = torch.zeros(*batch.input_ids.shape, inside.shape[1], device=logits.device)
    log_p[batch.rows, batch.columns] = inside
    return TeacherBatch(batch.input_ids, features, log_p, scored), logits


def place_bytes(head: TrainableHead, dtype: torch.dtype) -> int:
    """Bytes of a teacher batch per place of its padded batch, of a policy in `dtype`."""
    drafted = 0 if head.drafts_all_tokens else len(head.vocabulary)
    return 8 + len(head.config.layers) * head.config.aux_width * dtype.itemsize + 4 * drafted + 1


def unrolled_losses(
    head: TrainableHead, policy: Policy, teacher: TeacherBatch, config: DraftConfig, temperature: float
) -> list[PositionLoss]:
    """Loss and acceptance of every draft position on one batch, up to the first without rows.

    The rows of a position are the bases that reach it, so each position's are among those of the one before.
    """
    positions: list[PositionLoss] = []
    alive, before = torch.empty(0), teacher.scored  # of the position before: survival of its rows [M], its bases
    with autocast_of(policy):
        for j, (p, q) in enumerate(head.unroll(policy, teacher, config.depth, temperature)):
            if not len(q):
                break
            bases = _bases(teacher.scored, j)
            tokens = _draft_ids(head, F.pad(teacher.tokens[:, j + 2 :], (0, j + 2))[bases])
            reached = alive[bases[before]] if positions else torch.ones(len(q), device=q.device)
            losses, overlap = _row_losses(head, p, q, tokens, reached, config.loss, temperature)
            alive, before = reached * overlap, bases
            positions.append(PositionLoss(losses.mean(), float(overlap.detach().sum()), len(q)))
    return positions


def _bases(scored: Tensor, j: int) -> Tensor:
    """Where rounds can start whose draft j is compared: bases t with the scored entries t+1 and t+1+j. [N, L] bool"""
    return F.pad(scored[:, 1:], (0, 1)) & F.pad(scored[:, 1 + j :], (0, 1 + j))


def _draft_ids(head: TrainableHead, tokens: Tensor) -> Tensor:
    """Token ids [M] as the head counts them; -1: not in its vocabulary."""
    if head.drafts_all_tokens:
        return tokens
    places = torch.searchsorted(head.vocabulary, tokens).clamp(max=len(head.vocabulary) - 1)
    return torch.where(head.vocabulary[places] == tokens, places, -1)


def _row_losses(
    head: TrainableHead, p: Tensor, q: Tensor, tokens: Tensor, reached: Tensor, loss: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and survival [M] of one position's rows. p, q: see `TrainableHead.unroll`.

    Distributions over a whole vocabulary are computed `ROWS` at a time, and again in the backward pass.
    """
    if not head.drafts_all_tokens:
        return position_loss(loss, p, q, tokens, reached)

    def log_softmax(hidden: Tensor) -> Tensor:
        return torch.log_softmax(head.logits(hidden).float() / (temperature or 1.0), dim=-1)

    def part(p: Tensor, q: Tensor, tokens: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = log_softmax(p), log_softmax(q)
        return position_loss(loss, log_p.detach(), log_q, tokens, reached)

    rows = zip(*(x.split(ROWS) for x in (p, q, tokens, reached)), strict=True)
    parts = [checkpoint(part, *x, use_reentrant=False, preserve_rng_state=False) for x in rows]
    return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])


def weighted_loss(positions: list[PositionLoss], decay: float, rows: Sequence[int] | None = None) -> Tensor:
    """Mean of the positions' losses, each `decay` times the weight of the one before.

    Args:
        rows: of each position in a batch of which `positions` are a part. The parts' losses add up to the batch's, and
            so do their gradients; a part may lack the last positions. None: they are the whole batch.
    """
    rows = [x.rows for x in positions] if rows is None else rows
    weights = [decay**j for j in range(len(rows))]
    shares = [w * x.loss * (x.rows / n) for w, x, n in zip(weights, positions, rows, strict=False)]
    return torch.stack(shares).sum() / sum(weights)


def rows_by_position(scored: Tensor, depth: int) -> list[int]:
    """How many rows each draft position of a batch has, see `unrolled_losses`. `scored`: [N, L]"""
    length = scored.shape[1]
    return [int((scored[:, 1 : max(1, length - j)] & scored[:, 1 + j :]).sum()) for j in range(depth)]


@torch.no_grad()
def validate(
    head: TrainableHead, policy: Policy, pairs: Sequence[Pair], config: DraftConfig, temperature: float
) -> Validation:
    """Acceptance by draft position on rollouts that were not trained on."""
    batches = []
    for rows in microbatches([len(p) + len(c) for p, c in pairs], config.batch_tokens):
        teacher = run_teacher(head, policy, [pairs[i] for i in rows], temperature)
        batches.append(unrolled_losses(head, policy, teacher, config, temperature))
    return mean_acceptance(batches)


def mean_acceptance(batches: Sequence[Sequence[PositionLoss]]) -> Validation:
    """Acceptance over the draft positions of many batches."""
    depth = max((len(positions) for positions in batches), default=0)
    by_position = [[positions[j] for positions in batches if len(positions) > j] for j in range(depth)]
    return Validation.of([sum(p.accepted for p in here) / sum(p.rows for p in here) for here in by_position])


def autocast_of(policy: Policy) -> torch.autocast:
    """bfloat16 where the policy is; else none."""
    return torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy.dtype == torch.bfloat16)


def split_pairs(pairs: Sequence[Pair], share: float, rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Validation and training pairs; samples of one prompt stay on one side.

    A prompt of one token is no prompt (texts that begin with the tokenizer's first token): each is its own group.
    """
    groups = [tuple(p) if len(p) > 1 else (*p, *c) for p, c in pairs]
    names = sorted(set(groups))
    held = set(rng.sample(names, max(1, round(share * len(names)))))
    validation = [pair for pair, name in zip(pairs, groups, strict=True) if name in held]
    return validation, [pair for pair, name in zip(pairs, groups, strict=True) if name not in held] or validation
