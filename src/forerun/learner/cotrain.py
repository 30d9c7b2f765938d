"""Co-training: the drafter trains on the forward that the logprob stage runs anyway (2604.26779, section 3).

That forward leaves the hidden states at the drafter's auxiliary layers and the policy's distributions, detached. No
forward of the policy is added, and rollouts of zero advantage are trained on like all others. The drafter has its own
AdamW over float32 masters, learning rate and clipping: it shares no gradient and no norm with the policy. Its update
follows the policy's in stage train, so that an interrupted step changes neither. An EAGLE-3 head learns the policy's
distributions of before that update, an MTP head those of the updated output head on the hidden states of before.
When: `every-N` on every N-th step; `drift` on the step after one whose acceptance, at matched entropy, had fallen.
With a policy that is sharded over ranks: `cotrain_distributed.py`. Not supported: sequence packing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forerun.config import DraftConfig, TrainConfig
from forerun.drafters import DRAFTERS, Drafter
from forerun.drafters.trainable import TeacherBatch, TrainableHead
from forerun.drafters.training.heads import (
    PositionLoss,
    mean_acceptance,
    teacher_batch,
    unrolled_losses,
    weighted_loss,
)
from forerun.errors import UserError
from forerun.learner.optimizer import MasterOptimizer
from forerun.models import Policy
from forerun.models.logprobs import TokenBatch, completion_logits
from forerun.types import Rollout


@dataclass(slots=True)
class DriftMeter:
    """Acceptance at matched entropy.

    The first `window` steps are the reference: a line of acceptance length over entropy through their rollouts, each
    weighted by its rounds. Later steps are compared with what that line expects at their entropy (clamped to the
    range that the reference has seen), smoothed over `window` steps. Updates do not change the reference.
    """

    window: int
    points: list[tuple[float, float, float]] = field(default_factory=list)  # entropy, tokens per round, rounds
    steps: int = 0
    line: tuple[float, float, float, float] | None = None  # level, slope, least and largest entropy
    ratio: float = 1.0  # observed over expected, smoothed

    @property
    def drift(self) -> float:
        """Share by which acceptance has fallen; below 0: it rose."""
        return 1 - self.ratio

    def observe(self, entropies: Sequence[float], tokens: Sequence[int], rounds: Sequence[int]) -> None:
        """One step's rollouts: mean entropy in nats, tokens emitted, rounds of each."""
        points = [(e, t / r, float(r)) for e, t, r in zip(entropies, tokens, rounds, strict=True) if r > 0]
        if not points:
            return
        self.steps += 1
        if self.line is None:
            self.points += points
            if self.steps >= self.window:
                self.line, self.points = fit_line(self.points), []
            return
        level, slope, least, largest = self.line
        weight = sum(r for _, _, r in points)
        entropy = sum(e * r for e, _, r in points) / weight
        expected = level + slope * min(max(entropy, least), largest)
        observed = sum(a * r for _, a, r in points) / weight
        self.ratio += (observed / max(expected, 1.0) - self.ratio) / self.window

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {"points": self.points, "steps": self.steps, "line": self.line, "ratio": self.ratio}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.points, self.steps = [tuple(p) for p in state["points"]], state["steps"]
        self.line, self.ratio = None if state["line"] is None else tuple(state["line"]), state["ratio"]


def fit_line(points: Sequence[tuple[float, float, float]]) -> tuple[float, float, float, float]:
    """Weighted least squares through (x, y, weight): level at x = 0, slope, least and largest x."""
    weight = sum(w for _, _, w in points)
    mean_x = sum(x * w for x, _, w in points) / weight
    mean_y = sum(y * w for _, y, w in points) / weight
    spread = sum(w * (x - mean_x) ** 2 for x, _, w in points)
    slope = sum(w * (x - mean_x) * (y - mean_y) for x, y, w in points) / spread if spread > 1e-9 * weight else 0.0
    xs = [x for x, _, _ in points]
    return mean_y - slope * mean_x, slope, min(xs), max(xs)


class Schedule:
    """When the drafter is trained, as `speculation.train` says: every-N or drift."""

    def __init__(self, train: str, config: DraftConfig) -> None:
        self.every = int(train.removeprefix("every-")) if train != "drift" else None
        self.share, self.meter = config.drift_share, DriftMeter(config.drift_window)

    def due(self, step: int) -> bool:
        """Whether a step (0-based) ends with an update, as it begins."""
        return (step + 1) % self.every == 0 if self.every is not None else self.meter.drift > self.share

    def observe(self, rollouts: Sequence[Rollout], entropies: Sequence[float]) -> dict[str, float]:
        """Take in the acceptance of a step; metrics."""
        if self.every is not None:
            return {}
        self.meter.observe(entropies, [len(r.tokens) for r in rollouts], [r.rounds for r in rollouts])
        return {"spec/drift": self.meter.drift}


def nothing(_: str) -> None:
    """Warn nobody."""


class CacheWarning:
    """Given once: `draft.cache_gib` holds none of a step's micro-batches, so the drafter is not trained."""

    def __init__(self, gib: float, warn: Callable[[str], None]) -> None:
        self._gib, self._warn, self._given = gib, warn, False

    def give(self, smallest_bytes: int) -> None:
        """`smallest_bytes`: of a micro-batch of the step."""
        if not self._given:
            self._warn(
                f"draft.cache_gib={self._gib:g} is too small for any micro-batch of a step (the smallest needs "
                f"{smallest_bytes / 2**30:.2g} GiB): the drafter is not trained; raise it, or lower "
                "train.microbatch_tokens"
            )
        self._given = True


class CoTrainer:
    """Trains the drafter that the engine is using; the engine sees every update with the next weight version."""

    def __init__(
        self,
        drafter: Drafter,
        policy: Policy,
        train: str,
        config: DraftConfig,
        temperature: float,
        seed: int,
        warn: Callable[[str], None] = nothing,
    ) -> None:
        """`train` is `speculation.train`: every-N or drift. `warn`: see `CacheWarning`.

        Raises:
            UserError: drafters of its kind cannot be co-trained.
        """
        self.head = trained_head(drafter, train)
        self.policy = policy
        self.config = config
        self.temperature = temperature
        self.seed = seed
        self.schedule = Schedule(train, config)
        self.optimizer = draft_optimizer(self.head, config)
        self._teacher_cache: list[TeacherBatch] = []
        self._warning = CacheWarning(config.cache_gib, warn)
        self._room_bytes = self._left_out = self._smallest_bytes = 0
        self._due = False

    def begin(self, step: int) -> None:
        """A step (0-based) begins; this decides whether it ends with an update."""
        self._teacher_cache = []
        self._left_out = self._smallest_bytes = 0
        self._room_bytes = int(self.config.cache_gib * 2**30)
        self._due = self.schedule.due(step)

    def forward(self, model: Any, batch: TokenBatch) -> Tensor:
        """`completion_logits`, which caches the teacher batch when an update is due and memory allows."""
        if not self._due:
            return completion_logits(model, batch)
        teacher, logits = teacher_batch(self.head, model, batch, self.temperature)
        self._smallest_bytes = min(self._smallest_bytes or teacher.size_bytes, teacher.size_bytes)
        if teacher.size_bytes <= self._room_bytes:
            self._room_bytes -= teacher.size_bytes
            self._teacher_cache.append(teacher)
        else:
            self._left_out += len(batch.targets)
        return logits

    def update(self, step: int, rollouts: Sequence[Rollout], entropies: Sequence[float]) -> dict[str, float]:
        """The step's update, if it is due, and metrics."""
        metrics = self._update(step) if self._due else {}
        self._teacher_cache = []
        return metrics | self.schedule.observe(rollouts, entropies)

    def _update(self, step: int) -> dict[str, float]:
        """One optimizer step per batch of the logprob stage."""
        started = time.perf_counter()
        if self._left_out and not self._teacher_cache:
            self._warning.give(self._smallest_bytes)
        losses, norms, batches = [], [], []
        for index in order_of_batches(self.seed, step, len(self._teacher_cache)):
            positions = unrolled_losses(
                self.head, self.policy, self._teacher_cache[index], self.config, self.temperature
            )
            if not positions:
                continue
            loss = weighted_loss(positions, self.config.decay)
            loss.backward()
            norms.append(draft_step(self.optimizer, self.config.online_learning_rate))
            losses.append(float(loss.detach()))
            batches.append([p.detached() for p in positions])
        tokens = sum(int(x.scored.sum()) for x in self._teacher_cache)
        return draft_metrics(losses, norms, batches, tokens, self._left_out, started)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and drift; the drafter's weights are saved as a drafter."""
        return {"optimizer": self.optimizer.state_dict(), "drift": self.schedule.meter.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; the drafter's weights follow the masters."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.meter.load_state_dict(state["drift"])


def trained_head(drafter: Drafter, train: str) -> TrainableHead:
    """The head of a drafter. Raises UserError when drafters of its kind cannot be co-trained."""
    if not drafter.cotrains:
        raise UserError(
            f"speculation.train={train} needs one of {', '.join(DRAFTERS.with_trait('cotrains'))}, but the drafter is "
            f"'{drafter.name}'; set speculation.train=off"
        )
    return drafter.trainable_head()


def draft_optimizer(head: TrainableHead, config: DraftConfig) -> MasterOptimizer:
    """The drafter's own optimizer."""
    settings = TrainConfig(betas=(0.9, 0.95), max_grad_norm=config.online_max_grad_norm)
    return MasterOptimizer(head.parameters(), settings)


def order_of_batches(seed: int, step: int, count: int) -> list[int]:
    """In which order a step's batches are trained on, by the step's number alone."""
    return random.Random(f"{seed}/{step}").sample(range(count), count)


def draft_step(optimizer: MasterOptimizer, rate: float) -> float:
    """One optimizer step; the gradient's norm. A gradient that is not finite is skipped; its norm is NaN."""
    if not all(bool(torch.isfinite(m.grad).all()) for m in optimizer.masters if m.grad is not None):
        optimizer.clear()
        return math.nan
    return optimizer.step(rate)


def draft_metrics(
    losses: Sequence[float],
    norms: Sequence[float],
    batches: Sequence[Sequence[PositionLoss]],
    tokens: int,
    left_out: int,
    started: float,
) -> dict[str, float]:
    """Of an update; without a step it has no loss. `norms`: see `draft_step`. `started`: by time.perf_counter."""
    made = [norm for norm in norms if not math.isnan(norm)]
    learnt = {
        "draft/loss": sum(losses) / max(1, len(losses)),
        "draft/acceptance_simulated": mean_acceptance(batches).length,
        "draft/grad_norm": sum(made) / max(1, len(made)),
        "draft/skipped_updates": float(len(norms) - len(made)),
    }
    return (learnt if norms else {}) | {
        "draft/tokens": float(tokens),
        "draft/tokens_left_out": float(left_out),
        "time/draft_train": time.perf_counter() - started,
    }
