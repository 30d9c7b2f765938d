"""Training a `TrainableHead` on the policy's own rollouts, by training-time test.

In an engine the head's second draft reads its own first output, not the policy's hidden state. So pass j of J is fed
with pass j-1's outputs and compared with the policy's distribution at position t+1+j; its query at t sees the true text
up to t and its own guesses (keys of passes 1..j at t). Memory grows with the length of a batch (`drafters/unroll.py`);
where a head drafts the whole vocabulary, the policy's last hidden states are kept in place of its distributions.
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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forerun.config import DraftConfig
from forerun.drafters.trainable import TeacherBatch, TrainableHead, scored_bases
from forerun.drafters.training.losses import position_loss
from forerun.drafters.training.trainer import Pair, Training, TrainingSetup, Validation, fit
from forerun.models import Policy
from forerun.models.auxiliary import AuxiliaryStates
from forerun.models.logprobs import TokenBatch, completion_logits, microbatches, token_batch

ROWS = 512  # distributions that are held at once
KEPT_BYTES = 2**27  # of a draft position's distributions, up to which all are kept for the backward pass


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
    log_p = torch.zeros(*batch.input_ids.shape, len(head.vocabulary), device=logits.device)
    for part, rows, columns in zip(*(x.split(ROWS) for x in (logits, batch.rows, batch.columns)), strict=True):
        scaled = part.float() / (temperature or 1.0)
        log_p[rows, columns] = scaled[:, head.vocabulary] - torch.logsumexp(scaled, dim=-1, keepdim=True)
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
        for j, hidden in enumerate(head.unroll(policy, teacher, config.depth)):
            if not len(hidden):
                break
            bases = scored_bases(teacher.scored, j)
            reached = alive[bases[before]] if positions else torch.ones(len(hidden), device=hidden.device)
            losses, overlap = _row_losses(head, teacher, j, hidden, reached, config.loss, temperature)
            alive, before = reached * overlap, bases
            positions.append(PositionLoss(losses.mean(), float(overlap.detach().sum()), len(hidden)))
    return positions


def _draft_ids(head: TrainableHead, tokens: Tensor) -> Tensor:
    """Token ids [M] as the head counts them; -1: not in its vocabulary."""
    if head.drafts_all_tokens:
        return tokens
    places = torch.searchsorted(head.vocabulary, tokens).clamp(max=len(head.vocabulary) - 1)
    return torch.where(head.vocabulary[places] == tokens, places, -1)


def _row_losses(
    head: TrainableHead,
    teacher: TeacherBatch,
    j: int,
    hidden: Tensor,  # [M, H]
    reached: Tensor,  # [M]
    loss: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Loss and survival [M] of draft position j's rows.

    Where the distributions of all rows are large they are computed `ROWS` at a time, and again in the backward pass.
    """

    def part(places: Tensor, hidden: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
        log_p = policy_rows(head, teacher, places, temperature)
        log_q = torch.log_softmax(head.logits(hidden).float() / (temperature or 1.0), dim=-1)
        tokens = _draft_ids(head, teacher.tokens[places[:, 0], places[:, 1] + 1])
        return position_loss(loss, log_p, log_q, tokens, reached)

    places = rows_of_targets(teacher.scored, j)
    if 4 * len(hidden) * len(head.vocabulary) <= KEPT_BYTES:
        return part(places, hidden, reached)
    rows = zip(*(x.split(ROWS) for x in (places, hidden, reached)), strict=True)
    parts = [checkpoint(part, *x, use_reentrant=False, preserve_rng_state=False) for x in rows]
    return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])


def rows_of_targets(scored: Tensor, j: int) -> Tensor:
    """Sequence and teacher row that draft j of every base is compared with. [M, 2] int64"""
    places = scored_bases(scored, j).nonzero()
    places[:, 1] += 1 + j
    return places


@torch.no_grad()
def policy_rows(head: TrainableHead, teacher: TeacherBatch, places: Tensor, temperature: float) -> Tensor:
    """The policy's log-probabilities of the tokens that the head drafts, at teacher rows. [M, 2] -> [M, D]"""
    if not head.drafts_all_tokens:
        return teacher.log_p[places[:, 0], places[:, 1]]
    states = teacher.features[places[:, 0], places[:, 1]]
    return torch.log_softmax(head.logits(states).float() / (temperature or 1.0), dim=-1)


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
