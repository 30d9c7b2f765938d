"""What an update is made of, and what it came to: the same for one process and for many ranks.

An update is planned (`Objective.plan`), carried out on all rows or on a rank's (`Learner.apply`), and summed up
(`Objective.metrics`). Samples of zero advantage, and those that the off-policy correction masks whole, have zero
gradient and are not run again.
Axes: P prompts, n samples of each, M completion tokens of the batch, T of one rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forerun.algorithms import ALGORITHMS, Algorithm, definitions
from forerun.algorithms.losses import batch_loss, loss_fault_text
from forerun.algorithms.off_policy import correct
from forerun.config import TrainConfig
from forerun.learner.batching import Targets, policy_batch
from forerun.tracking.metrics import define
from forerun.types import Rollout


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of a batch before its update, one tensor [T] per rollout."""

    logprobs: list[Tensor]  # by the policy
    reference: list[Tensor] | None  # by the reference policy
    entropy: float  # nats per token
    entropies: list[float] = field(default_factory=list)  # the same per rollout


@dataclass(frozen=True, slots=True)
class Update:
    """The plan of an update, complete before its first pass."""

    rollouts: Sequence[Rollout]
    targets: Sequence[Targets]  # of each rollout
    chunks: list[list[int]]  # rollouts of each optimizer step; a step that would have none is left out
    size: float  # by which the loss of each chunk is divided, see `Aggregation`
    metrics: dict[str, float] = field(default_factory=dict)  # of the off-policy correction


@dataclass(slots=True)
class UpdateResult:
    """What an update, or a rank's part of it, came to."""

    sums: dict[str, float] = field(default_factory=dict)  # over tokens, by metric; ranks' sums add up
    tokens: int = 0
    norms: list[float] = field(default_factory=list)  # of the gradient at each optimizer step, the same on every rank
    skipped: list[int] = field(default_factory=list)  # why each of the others was skipped, likewise; see `fault_text`

    def add(self, sums: dict[str, Tensor] | dict[str, float], tokens: int) -> None:
        """Take in a micro-batch or a rank."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.tokens += tokens


class Objective:
    """The recipe's algorithm with its settings."""

    def __init__(self, config: TrainConfig, max_new_tokens: int) -> None:
        """`max_new_tokens` of a rollout: what Dr. GRPO divides by. Raises UserError when there is no such algorithm."""
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.algorithm: Algorithm = ALGORITHMS.load(config.algorithm)
        self.skip_reason = ""  # of the last optimizer step that was skipped
        self.skipped_in_row = 0  # optimizer steps, up to the newest update
        define(definitions(config.algorithm))

    def plan(self, rollouts: Sequence[Rollout], advantages: Tensor, scored: Scored) -> Update:
        """Weigh the tokens and choose the rollouts that have a gradient. `advantages` is [P·n]."""
        config = self.config
        lengths = [len(r.tokens) for r in rollouts]
        behaviour = sampled_logprobs(rollouts)
        references: Sequence[Tensor | None] = scored.reference or [None] * len(rollouts)
        correction = correct(config, torch.cat(scored.logprobs).cpu(), behaviour, lengths)
        targets = [
            Targets(old, sampled, reference, advantage.expand(n), importance)
            for old, sampled, reference, advantage, importance, n in zip(
                scored.logprobs,
                behaviour.split(lengths),
                references,
                advantages.cpu(),
                correction.importance_weights.split(lengths),
                lengths,
                strict=True,
            )
        ]
        order = [i for i, t in enumerate(targets) if t.has_gradient]
        chunks = [order[u :: config.updates_per_step] for u in range(config.updates_per_step)]
        size = self.algorithm.aggregation.size(lengths, self.max_new_tokens) / len(chunks)
        return Update(rollouts, targets, [c for c in chunks if c], size, correction.metrics(lengths))

    def metrics(self, update: Update, result: UpdateResult, learning_rate: float, scored: Scored) -> dict[str, float]:
        """What `Learner.update` returns."""
        if not update.chunks:
            result = self._without_gradient(update)
        self.skipped_in_row = len(result.skipped) + (0 if result.norms else self.skipped_in_row)
        if result.skipped:
            self.skip_reason = fault_text(self.config.algorithm, max(result.skipped))
        tokens = max(1, result.tokens)
        return {name: total / tokens for name, total in result.sums.items()} | {
            "policy/loss": result.sums["policy/loss"] / self.config.updates_per_step,
            "policy/grad_norm": sum(result.norms) / max(1, len(result.norms)),
            "policy/skipped_updates": float(len(result.skipped)),
            "policy/lr": learning_rate,
            "policy/entropy": scored.entropy,
            **update.metrics,
        }

    def _without_gradient(self, update: Update) -> UpdateResult:
        """The statistics of a policy that does not move."""
        result = UpdateResult()
        batch = policy_batch(torch.cat([t.old for t in update.targets]), update.targets)
        result.add(batch_loss(self.algorithm, batch, self.config, update.size)[1], len(batch.old))
        return result


def fault_text(algorithm: str, fault: int) -> str:
    """Why an optimizer step was skipped: 1: its gradient; 2 and more: twice what `loss_fault` says of its loss."""
    if fault >= 2:
        return loss_fault_text(algorithm, fault // 2)
    return (
        "The loss is finite, but the policy's gradient is not. Lower train.learning_rate, or use policy.dtype=float32"
    )


def sampled_logprobs(rollouts: Sequence[Rollout]) -> Tensor:
    """Log-probabilities that the engine returned with the tokens. [M]"""
    return torch.tensor([x for r in rollouts for x in r.logprobs])


def mismatch(rollouts: Sequence[Rollout], scored: Scored) -> dict[str, float]:
    """How far the engine's log-probabilities of its own tokens are from the learner's: KL (k3), largest gap, ratio."""
    gap = torch.cat([x.cpu() for x in scored.logprobs]) - sampled_logprobs(rollouts)
    return {
        "mismatch/kl": float((gap.exp() - 1 - gap).mean()),
        "mismatch/logp_diff_max": float(gap.abs().max()),
        "mismatch/prob_ratio": float(gap.abs().exp().mean()),
    }


def mismatch_by_version(
    rollouts: Sequence[Rollout], scored: Scored, version: int, probe: Sequence[Rollout], probed: Scored | None
) -> dict[str, float | None]:
    """`mismatch` of rollouts by the very version that scored them; of the others, whose policy was another, `async/kl`.

    Args:
        probe: rollouts by `version` that are not trained on yet, where the engine runs ahead; `probed`: the learner's.

    Returns:
        Null where no rollout is of this version.
    """
    own = [i for i, rollout in enumerate(rollouts) if all(v == version for v in rollout.versions)]
    if probed is not None:
        found: dict[str, float | None] = {**mismatch(probe, probed)}
    elif own:
        found = {**mismatch([rollouts[i] for i in own], Scored([scored.logprobs[i] for i in own], None, 0.0))}
    else:
        found = dict.fromkeys(("mismatch/kl", "mismatch/logp_diff_max", "mismatch/prob_ratio"))
    if len(own) < len(rollouts):
        found["async/kl"] = mismatch(rollouts, scored)["mismatch/kl"]
    return found
