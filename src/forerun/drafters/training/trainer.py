"""The training loop of every drafter: AdamW, warm-up, shuffled batches, clipping; validate, keep the best, stop early.

What differs between drafters comes in as two functions: one adds a batch's gradient, one validates.
With a `StateFile` the state of every finished epoch is on the disk, whole or not at all, and a training that was killed
goes on from there to the weights that it would have had, bit for bit.
Left out: batches and losses (`training.py`, `distill.py`), and training beside the policy (`learner/cotrain.py`).
"""

from __future__ import annotations

import math
import os
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forerun.config import DraftConfig
from forerun.errors import UserError
from forerun.learner.sft import learning_rate_factor
from forerun.tracking.files import disk_errors

MAX_GRAD_NORM = 0.5
WARMUP = 20  # steps, at most; a tenth of all when that is less


@dataclass(frozen=True, slots=True)
class Validation:
    """Acceptance on held-out rollouts, exact in p and q (no coins): per draft position, given the ones before."""

    per_position: list[float]
    length: float  # expected tokens per round with J drafts

    def __str__(self) -> str:
        rates = " ".join(f"{a:.2f}" for a in self.per_position)
        return f"acceptance by position {rates}, {self.length:.2f} tokens per round"


Report = Callable[[int, int, float], None]  # step, steps, loss
Validated = Callable[[int, Validation], None]  # epoch, result


@dataclass(frozen=True, slots=True)
class StateFile:
    """The state of a training after its last finished epoch, replaced as a whole."""

    path: Path

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file by `state`.

        Raises:
            UserError: the disk is full or cannot be written; the earlier state is untouched.
        """
        draft = self.path.with_name(f".{self.path.name}.tmp")
        with disk_errors(self.path):
            try:
                with draft.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, self.path)
            except RuntimeError as error:  # torch.save reports a full disk so
                raise UserError(f"Cannot write {self.path}: {error}; free space, then resume the training") from error
            finally:
                draft.unlink(missing_ok=True)

    def restore(self, run: Fitting) -> bool:
        """Put the saved state into `run`; false: no epoch was finished, and `run` is as it was.

        Raises:
            UserError: the file cannot be read, or is of another drafter.
        """
        if not self.path.exists():
            return False
        try:  # read to the CPU, where the optimizer keeps its step counts; the rest is copied to where the module is
            run.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"The training state {self.path} is broken or of another drafter ({reason}); delete it to train anew"
            ) from None
        return True


class Fitting:
    """A training between two epochs: everything that decides how it goes on."""

    def __init__(self, module: nn.Module, config: DraftConfig, rng: random.Random) -> None:
        self.module, self.config, self.rng = module, config, rng
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.epoch = self.step = self.best_epoch = 0
        self.best = Validation([], 0.0)
        self.best_weights: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """All epochs are done, or `patience` of them in a row did not help."""
        return self.epoch >= self.config.epochs or self.epoch - self.best_epoch >= self.config.patience

    def train(self, batches: Sequence[list[int]], backward: Callable[[list[int]], float], report: Report) -> None:
        """One epoch.

        Raises:
            UserError: a loss is not finite.
        """
        steps = self.config.epochs * len(batches)
        for rows in self.rng.sample(batches, len(batches)):
            factor = learning_rate_factor(self.step, steps, min(WARMUP, steps // 10 + 1))
            self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * factor
            loss = backward(rows)
            if not math.isfinite(loss):
                rate = self.config.learning_rate
                raise UserError(
                    f"The drafter's loss is {loss} at step {self.step + 1}; lower draft.learning_rate={rate}"
                )
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            report(self.step, steps, loss)
        self.epoch += 1

    def note(self, result: Validation) -> None:
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
        self.best = Validation(**state["best"])


def fit(
    module: nn.Module,
    batches: Sequence[list[int]],
    config: DraftConfig,
    rng: random.Random,
    backward: Callable[[list[int]], float],
    validation: Callable[[], Validation],
    report: Report,
    validated: Validated,
    file: StateFile | None = None,
) -> Validation:
    """Train `module` in place; it ends with the weights of the epoch that validates best, and that result is returned.

    Args:
        batches: the batches of an epoch, as whatever `backward` takes for one.
        config: epochs, learning_rate and patience are read.
        rng: orders the batches anew in every epoch.
        backward: adds the gradient of one batch to the module's and returns its loss.
        validation: judges the module as it is.
        report: called after every optimizer step. validated: called with (epoch, result); epoch 0 is before training.
        file: where the state of every epoch is kept; one that holds a state already is gone on from.

    Raises:
        UserError: a loss is not finite, or the state cannot be written, read, or put into this module.
    """
    run = Fitting(module, config, rng)
    if file is None or not file.restore(run):
        result = validation()
        validated(0, result)
        run.note(result)
    while not run.finished:
        run.train(batches, backward, report)
        result = validation()
        validated(run.epoch, result)
        run.note(result)
        if file is not None:
            file.save(run.state_dict())
    module.load_state_dict(run.best_weights)
    return run.best
