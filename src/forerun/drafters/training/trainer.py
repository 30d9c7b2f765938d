"""The training loop of every drafter: AdamW, warm-up, shuffled batches, clipping; validate, keep the best, stop early.

What differs between drafters comes in as two functions: one adds a batch's gradient, one validates (`heads.py`,
`distill.py`). With a `StateFile` the state of every finished epoch is saved, and a killed training resumes from
there, bit-equal to one that was not killed.
"""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from forerun.config import DraftConfig
from forerun.errors import UserError
from forerun.tracking.files import replacing

MAX_GRAD_NORM = 0.5
WARMUP = 20  # steps, at most; a tenth of all when that is less
Pair = tuple[list[int], list[int]]  # prompt ids, completion ids
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Validation:
    """Acceptance on held-out rollouts, exact in p and q: per draft position, given the ones before."""

    per_position: list[float]
    length: float  # expected tokens per round with J drafts

    @classmethod
    def of(cls, rates: list[float]) -> Validation:
        """Of acceptance rates, each given that all drafts before were accepted."""
        length = product = 1.0
        for rate in rates:
            product *= rate
            length += product
        return cls(rates, length)

    def __str__(self) -> str:
        rates = " ".join(f"{a:.2f}" for a in self.per_position)
        return f"acceptance by position {rates}, {self.length:.2f} tokens per round"


@dataclass(frozen=True, slots=True)
class StepDone:
    """An optimizer step was made, the `step`-th of at most `steps`."""

    step: int
    steps: int
    loss: float
    rate: float  # steps per second


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch was validated; epoch 0 is before training."""

    epoch: int
    result: Validation


Training = Generator[StepDone | EpochDone, None, T]  # yields events, returns its result


@dataclass(frozen=True, slots=True)
class StateFile:
    """The state of a training after its last finished epoch, replaced as a whole."""

    path: Path

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file by `state`.

        Raises UserError when the disk is full or cannot be written; the earlier state is untouched.
        """
        try:
            with replacing(self.path) as file:
                torch.save(state, file)
        except RuntimeError as error:  # how torch.save reports a full disk
            raise UserError(f"Cannot write {self.path}: {error}; free space, then resume the training") from error

    def restore(self, trainer: Trainer) -> bool:
        """Put the saved state into `trainer`; false: no epoch was finished, and it is as it was.

        Raises UserError when the file cannot be read, or is of another drafter.
        """
        if not self.path.exists():
            return False
        try:  # read to the CPU, where the optimizer keeps its step counts; the rest is copied to where the module is
            trainer.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"The training state {self.path} is broken or of another drafter ({reason}); delete it to train anew"
            ) from None
        return True


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """What a drafter is trained on, and how."""

    pairs: Sequence[Pair]  # prompts and completions that the policy sampled, or other texts
    config: DraftConfig
    temperature: float  # at which the policy will be sampled; 0 counts as 1
    seed: int  # of the split and of the order of batches
    file: StateFile | None = None  # where the state of every epoch is kept; one that holds a state is resumed


class Trainer:
    """The state of a training between two epochs, and its loop."""

    def __init__(self, module: nn.Module, config: DraftConfig, rng: random.Random) -> None:
        self.module, self.config, self.rng = module, config, rng
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.epoch = self.step = self.best_epoch = 0
        self._started, self._first = time.perf_counter(), 0  # of this process
        self.best = Validation([], 0.0)
        self.best_weights: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """All epochs are done, or `patience` of them in a row did not help."""
        return self.epoch >= self.config.epochs or self.epoch - self.best_epoch >= self.config.patience

    def train(self, batches: Sequence[list[int]], backward: Callable[[list[int]], float]) -> Training[None]:
        """One epoch; yields after every optimizer step. Raises UserError when a loss is not finite."""
        steps = self.config.epochs * len(batches)
        for rows in self.rng.sample(batches, len(batches)):
            factor = learning_rate_factor(self.step, steps, min(WARMUP, steps // 10 + 1))
            self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * factor
            loss = backward(rows)
            if not math.isfinite(loss):
                raise UserError(
                    f"The drafter's loss is {loss} at step {self.step + 1}; lower "
                    f"draft.learning_rate={self.config.learning_rate}"
                )
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            rate = (self.step - self._first) / (time.perf_counter() - self._started)
            yield StepDone(self.step, steps, loss, rate)
        self.epoch += 1

    def keep_best(self, result: Validation) -> None:
        """Keep the present weights if none before validated as well."""
        if not self.best_weights or result.length > self.best.length:
            self.best, self.best_epoch = result, self.epoch
            self.best_weights = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, the order of batches to come, and the best so far."""
        return {
            "weights": self.module.state_dict(),
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
            "order": self.rng.getstate(),
            "counts": [self.epoch, self.step, self.best_epoch],
            "best": asdict(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.module.load_state_dict(state["weights"])
        self.best_weights = state["best_weights"]
        self.optimizer.load_state_dict(state["optimizer"])
        version, internal, gauss = state["order"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.epoch, self.step, self.best_epoch = state["counts"]
        self._first = self.step
        self.best = Validation(**state["best"])


def fit(
    module: nn.Module,
    batches: Sequence[list[int]],
    setup: TrainingSetup,
    rng: random.Random,
    backward: Callable[[list[int]], float],
    validation: Callable[[], Validation],
) -> Training[Validation]:
    """Train `module` in place; it ends with the weights of the epoch that validates best, and that result is returned.

    Args:
        batches: the batches of an epoch, as whatever `backward` takes for one.
        setup: epochs, learning_rate, patience and the state file are read.
        rng: orders the batches anew in every epoch.
        backward: adds the gradient of one batch to the module's and returns its loss.
        validation: validates the module as it is.

    Raises UserError when a loss is not finite, or the state cannot be written, read, or put into this module.
    """
    trainer, file = Trainer(module, setup.config, rng), setup.file
    if file is None or not file.restore(trainer):
        result = validation()
        yield EpochDone(0, result)
        trainer.keep_best(result)
    while not trainer.finished:
        yield from trainer.train(batches, backward)
        result = validation()
        yield EpochDone(trainer.epoch, result)
        trainer.keep_best(result)
        if file is not None:
            file.save(trainer.state_dict())
    module.load_state_dict(trainer.best_weights)
    return trainer.best


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then cosine decay from 1 to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * progress)
