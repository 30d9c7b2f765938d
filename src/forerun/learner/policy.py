"""The learner in one process: log-probabilities by the policy itself, and the GRPO update.

One batch is P prompts with n samples each, flat: sample i belongs to prompt i // n. Micro-batches hold a bounded number
of padded tokens; their gradients are summed with one normaliser, the completion tokens of the whole batch, so that the
update does not depend on how the batch was cut, nor on whether it was packed. Samples of zero advantage, and those that
the off-policy correction masks whole, have zero gradient and are not run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forerun.config import TrainConfig
from forerun.errors import Interrupted, UserError
from forerun.learner.correction import correct
from forerun.learner.forward import (
    TokenBatch,
    completion_logits,
    microbatches,
    packed_batch,
    token_batch,
    token_entropy,
    token_logprobs,
)
from forerun.learner.losses import clipped_policy_loss, kl_k3
from forerun.learner.optimizer import MasterOptimizer
from forerun.learner.packing import packed_microbatches, require_packing
from forerun.models import Policy
from forerun.records import Rollout


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of a batch before its update, one tensor [T_i] per rollout."""

    logprobs: list[Tensor]  # by the policy
    reference: list[Tensor] | None  # by the reference policy
    entropy: float  # nats per token
    entropies: list[float] = field(default_factory=list)  # the same per rollout


@dataclass(frozen=True, slots=True)
class Targets:
    """What the loss reads beside the policy's log-probabilities, one tensor [T_i] per rollout."""

    old: Sequence[Tensor]  # log-probabilities before the update
    reference: Sequence[Tensor] | None
    advantages: Sequence[Tensor]
    correction: Sequence[Tensor]


class Learner:
    """Trains the live policy module; the engine sees every update at once because it runs the same parameters."""

    def __init__(self, policy: Policy, config: TrainConfig, temperature: float) -> None:
        self.policy, self.config = policy, config
        self.temperature = temperature
        self.optimizer = MasterOptimizer(policy.model.parameters(), config)
        self._reference = copy.deepcopy(policy.model).requires_grad_(False) if config.kl > 0 else None
        if config.packing:
            require_packing(policy)
        if config.gradient_checkpointing:
            _enable_checkpointing(policy.model)

    @torch.no_grad()
    def score(
        self,
        rollouts: Sequence[Rollout],
        tick: Callable[[int], None] = lambda n: None,
        forward: Callable[[Any, TokenBatch], Tensor] = completion_logits,
    ) -> Scored:
        """Recompute every token's log-probability under the current policy (and the reference).

        Args:
            forward: runs the policy's own batches, and may keep what else it sees there (`learner/cotrain.py`). Any
                other than the default is given one sequence per row, also where the recipe packs.
        """
        own, entropies = [torch.empty(0)] * len(rollouts), [torch.empty(0)] * len(rollouts)
        reference = None if self._reference is None else list(own)
        entropy_sum, done = 0.0, 0
        packed = self.config.packing and forward is completion_logits
        for rows, batch in self._batches(rollouts, range(len(rollouts)), packed):
            logits = forward(self.policy.model, batch)
            _scatter(token_logprobs(logits, batch.targets, self.temperature), rows, rollouts, own)
            entropy = token_entropy(logits, self.temperature)
            _scatter(entropy, rows, rollouts, entropies)
            entropy_sum += float(entropy.sum())
            if reference is not None:
                logits = completion_logits(self._reference, batch)
                _scatter(token_logprobs(logits, batch.targets, self.temperature), rows, rollouts, reference)
            done += len(rows)
            tick(done)
        mean = entropy_sum / max(1, sum(len(r.tokens) for r in rollouts))
        return Scored(own, reference, mean, [float(e.mean()) for e in entropies])

    def train(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,  # [P·n]
        scored: Scored,
        learning_rate: float,
        stop_requested: Callable[[], bool] = lambda: False,
        tick: Callable[[int], None] = lambda n: None,
    ) -> dict[str, float]:
        """Update the policy on one batch; returns metrics.

        Raises:
            Interrupted: `stop_requested` before the first optimizer step; the policy is as it was.
            UserError: the loss or the gradient is not finite; the policy is as it was before this optimizer step.
        """
        lengths = [len(r.tokens) for r in rollouts]
        correction = correct(self.config, torch.cat(scored.logprobs), _by_the_engine(rollouts), lengths)
        spread = [a.expand(n) for a, n in zip(advantages.cpu(), lengths, strict=True)]
        targets = Targets(scored.logprobs, scored.reference, spread, correction.weights.split(lengths))
        taught = [bool(x.any() and w.any()) for x, w in zip(targets.advantages, targets.correction, strict=True)]
        order = [i for i in range(len(rollouts)) if taught[i] or scored.reference is not None]
        chunks = [order[u :: self.config.updates_per_step] for u in range(self.config.updates_per_step)]
        totals = dict.fromkeys(("loss", "ratio", "low", "high", "kl", "tokens"), 0.0)
        norms = []
        for number, chunk in enumerate(chunks):
            size = sum(lengths) / len(chunks)
            for rows, batch in self._batches(rollouts, chunk, self.config.packing):
                if number == 0 and stop_requested():
                    self.optimizer.clear()
                    raise Interrupted
                self._accumulate(batch, rows, targets, size, totals)
                tick(len(rows))
            if chunk:
                norms.append(self._step(learning_rate))
        tokens = max(1.0, totals["tokens"])
        return {
            "policy/loss": totals["loss"] / len(chunks),
            "policy/grad_norm": sum(norms) / max(1, len(norms)),
            "policy/lr": learning_rate,
            "policy/ratio_mean": totals["ratio"] / tokens if order else 1.0,
            "policy/clip_low": totals["low"] / tokens,
            "policy/clip_high": totals["high"] / tokens,
            "policy/kl": totals["kl"] / tokens,
            "policy/entropy": scored.entropy,
            **correction.metrics(lengths),
        }

    def _accumulate(
        self, batch: TokenBatch, rows: list[int], targets: Targets, size: float, totals: dict[str, float]
    ) -> None:
        """Forward and backward of one micro-batch; its loss is a sum over tokens divided by `size`."""

        def of(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([parts[i] for i in rows]).to(self.policy.device)

        config, old = self.config, of(targets.old)
        logprobs = token_logprobs(completion_logits(self.policy.model, batch), batch.targets, self.temperature)
        correction, advantages = of(targets.correction), of(targets.advantages)
        terms = clipped_policy_loss(logprobs, old, advantages, config.clip_low, config.clip_high, correction)
        loss = terms.loss.sum() / size
        if targets.reference is not None:
            kl = kl_k3(logprobs, of(targets.reference))
            loss = loss + config.kl * kl.sum() / size
            totals["kl"] += float(kl.detach().sum())
        loss.backward()
        totals["loss"] += float(loss.detach())
        totals["ratio"] += float(terms.ratio.sum())
        totals["low"] += float(terms.clipped_low.sum())
        totals["high"] += float(terms.clipped_high.sum())
        totals["tokens"] += len(old)

    def _step(self, learning_rate: float) -> float:
        finite = all(bool(torch.isfinite(m.grad).all()) for m in self.optimizer.masters if m.grad is not None)
        if not finite:
            self.optimizer.clear()
            raise UserError(
                "The policy's gradient is not finite; nothing was updated. Lower train.learning_rate, "
                "or use policy.dtype=float32"
            )
        return self.optimizer.step(learning_rate)

    def _batches(
        self, rollouts: Sequence[Rollout], chosen: Sequence[int], packed: bool
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        """Micro-batches of the chosen rollouts, each with their numbers in the order of its completions."""
        pairs = [(rollouts[i].prompt_ids, rollouts[i].tokens) for i in chosen]
        lengths, tokens = [len(prompt) + len(completion) for prompt, completion in pairs], self.config.microbatch_tokens
        if packed:
            for group in packed_microbatches(lengths, tokens):
                batch = packed_batch([[pairs[j] for j in row] for row in group], self.policy.device)
                yield [chosen[j] for row in group for j in row], batch
        else:
            for row in microbatches(lengths, tokens):
                yield [chosen[j] for j in row], token_batch([pairs[j] for j in row], self.policy.device)


def mismatch(rollouts: Sequence[Rollout], scored: Scored) -> dict[str, float]:
    """How far the engine's log-probabilities of its own tokens are from the learner's: KL (k3), largest gap, ratio."""
    gap = torch.cat([x.cpu() for x in scored.logprobs]) - _by_the_engine(rollouts)
    return {
        "mismatch/kl": float((gap.exp() - 1 - gap).mean()),
        "mismatch/logp_diff_max": float(gap.abs().max()),
        "mismatch/prob_ratio": float(gap.abs().exp().mean()),
    }


def _by_the_engine(rollouts: Sequence[Rollout]) -> Tensor:  # [M] log-probabilities that came with the tokens
    return torch.tensor([x for r in rollouts for x in r.logprobs])


def _scatter(values: Tensor, rows: list[int], rollouts: Sequence[Rollout], into: list[Tensor]) -> None:
    for i, part in zip(rows, values.split([len(rollouts[i].tokens) for i in rows]), strict=True):
        into[i] = part.cpu()


def _enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass.

    It needs training mode, whose dropout is switched off: the learner scores the policy that generated.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
