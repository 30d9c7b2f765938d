"""A drafter's training run to its end, with what it yielded; and the distributions that a head is trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from forerun.drafters.trainable import TeacherBatch, TrainableHead
from forerun.drafters.training.heads import policy_rows, rows_of_targets
from forerun.drafters.training.trainer import EpochDone, Training, Validation
from forerun.models import Policy


def watched(work: Training[Validation], report: Callable[..., None], validated: Callable[..., None]) -> Validation:
    """Hand (step, steps, loss) of every optimizer step and (epoch, result) of every validation to two functions."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            result: Validation = end.value
            return result
        if isinstance(event, EpochDone):
            validated(event.epoch, event.result)
        else:
            report(event.step, event.steps, event.loss)


def validations(work: Training[Validation]) -> tuple[Validation, list[tuple[int, Validation]]]:
    """The best validation, and all of them with their epochs."""
    found: list[tuple[int, Validation]] = []
    best = watched(work, lambda *_: None, lambda epoch, result: found.append((epoch, result)))
    return best, found


def distributions(
    head: TrainableHead, policy: Policy, teacher: TeacherBatch, depth: int, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Per draft position log p and log q of all its rows, [M, D] each."""
    return [
        (
            policy_rows(head, teacher, rows_of_targets(teacher.scored, j), temperature),
            torch.log_softmax(head.logits(hidden).float() / temperature, dim=-1),
        )
        for j, hidden in enumerate(head.unroll(policy, teacher, depth))
    ]
