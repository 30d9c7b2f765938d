"""The five stages of an RL step around a rollout: in turn, or asynchronous with policy lag.

Seconds per step; stages are named as the loop's timers name them. MFU is model FLOP of the computed (padded) tokens
over the bf16 peak of the training GPUs; pipeline bubbles and optimizer traffic are inside it. Not modelled: reward
models, evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forerun.errors import UserError
from forerun.simulate.core.hardware import Hardware
from forerun.simulate.core.shapes import ModelShape

REFIT_BYTES_PER_S = 100e9  # bf16 weights learner -> engines; NeMo-RL: 4B 0.07-0.15 s, 30B 0.48-0.67, 235B 4.56-4.85


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of one synchronous step."""

    data_s: float
    prepare_s: float
    generation_s: float
    logprob_s: float
    train_s: float

    @property
    def total_s(self) -> float:
        """The step: Eq. 15, the sum of the stages."""
        return self.data_s + self.prepare_s + self.generation_s + self.logprob_s + self.train_s

    @property
    def learner_s(self) -> float:
        """Everything but generation."""
        return self.total_s - self.generation_s


@dataclass(frozen=True, slots=True)
class Learner:
    """The training side. `logprob_passes`: forward passes before the update (policy, reference)."""

    train_mfu: float = 0.3
    logprob_mfu: float = 0.3
    logprob_passes: float = 2.0
    prepare_fixed_s: float = 1.0
    data_s: float = 0.2


def forward_flops(model: ModelShape, sequences: float, length_tokens: float) -> float:
    """FLOP of one forward pass: 2 per active parameter and token, and causal attention 4 L H d S/2 per token."""
    tokens = sequences * length_tokens
    head = model.vocab * model.hidden
    attention = 4.0 * model.layers * model.heads * model.head_dim * length_tokens / 2
    return tokens * (2.0 * (model.active_body_params + head) + attention)


def refit_s(model: ModelShape) -> float:
    """Seconds to move bf16 weights from the learner to the engines."""
    return 2.0 * model.params / REFIT_BYTES_PER_S


def learner_stages(
    learner: Learner,
    model: ModelShape,
    gpu: Hardware,
    gpus: int,
    sequences: float,
    length_tokens: float,
    generation_s: float,
) -> Stages:
    """Stages of a step whose generation is known; forward + backward is three forwards (Eq. 16)."""
    rate = gpus * gpu.flops["bf16"]
    forward = forward_flops(model, sequences, length_tokens)
    return Stages(
        data_s=learner.data_s,
        prepare_s=learner.prepare_fixed_s + refit_s(model),
        generation_s=generation_s,
        logprob_s=learner.logprob_passes * forward / (learner.logprob_mfu * rate),
        train_s=3.0 * forward / (learner.train_mfu * rate),
    )


@dataclass(frozen=True, slots=True)
class AsyncStep:
    """A steady step: the learner works, then waits for rollouts."""

    step_s: float
    exposed_s: float  # exposed generation: the learner waits


def async_step(stages: Stages, lag: int) -> AsyncStep:
    """Eq. 17: lag 0 is the sum of the stages; from lag 1 on generation overlaps with the learner.

    Weights move while neither side works, so `prepare` is on the path of both.

    Raises:
        UserError: a negative lag.
    """
    if lag < 0:
        raise UserError(f"A policy lag of {lag} cannot be; 0 is synchronous.")
    if lag == 0:
        return AsyncStep(stages.total_s, stages.generation_s)
    step_s = max(stages.learner_s, stages.generation_s + stages.prepare_s)
    return AsyncStep(step_s, step_s - stages.learner_s)


def step_bound(generation_share: float, alpha: float) -> float:
    """The paper's bound (2604.26779, section 2.2): S <= 1 / (R/α + 1 - R) with R = T_gen / T_step."""
    return 1.0 / (generation_share / alpha + 1.0 - generation_share)


@dataclass(frozen=True, slots=True)
class Split:
    """GPUs that generate, GPUs that train, and their step."""

    generation_gpus: int
    training_gpus: int
    step: AsyncStep
    stages: Stages


def best_split(gpus: int, unit: int, lag: int, stages_of: Callable[[int, int], Stages], points: int = 24) -> Split:
    """The split of `gpus` with the shortest step; both sides in multiples of `unit` (a replica).

    `stages_of(generation_gpus, training_gpus)` gives the stages; at most `points` splits are tried, evenly spread.

    Raises:
        UserError: fewer than two units.
    """
    units = gpus // unit
    if units < 2:
        raise UserError(
            f"{gpus} GPUs or machines cannot be split into replicas of {unit} beside a learner; {2 * unit} can, "
            "or set lag=0."
        )
    stride = max(1, (units - 1) // points)
    tried = []
    for generating in range(1, units, stride):
        stages = stages_of(generating * unit, gpus - generating * unit)
        tried.append(Split(generating * unit, gpus - generating * unit, async_step(stages, lag), stages))
    return min(tried, key=lambda split: (split.step.step_s, split.generation_gpus))
