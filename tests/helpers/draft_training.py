"""A drafter's training run to its end, with what it yielded."""

from __future__ import annotations

from collections.abc import Callable

from forerun.drafters.training.trainer import EpochDone, Training, Validation


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
