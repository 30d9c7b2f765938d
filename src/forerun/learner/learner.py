"""The learner in one process: log-probabilities by the policy itself, and the GRPO update.

One batch is P prompts with n samples each, flat: sample i belongs to prompt i // n. Micro-batches hold a bounded number
of padded tokens; their gradients are summed with one normaliser, the completion tokens of the whole batch, so that the
update does not depend on how the batch was cut, nor on whether it was packed. Samples of zero advantage, and those that
the off-policy correction masks whole, have zero gradient and are not run again.

With `train.lora` the adapter's matrices learn in place of the weights (`lora.py`).
The same class is a rank's part of a sharded learner (`worker.py`): an update is planned (`plan_update`), carried out by
`Learner.apply` on whatever rows it is given, and summed up (`update_metrics`). Ranks take turns in the same
collectives, so each runs as many micro-batches as the one that has most; the missing ones are empty.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.algorithms.losses import clipped_policy_loss, kl_k3
from forerun.algorithms.off_policy import correct
from forerun.config import TrainConfig
from forerun.errors import Interrupted, UserError
from forerun.events import Counting
from forerun.learner.lora import LoraAdapter, save_settings
from forerun.learner.optimizer import MasterOptimizer
from forerun.learner.packing import attend_by_sequence, packed_microbatches, require_packing
from forerun.learner.parallel import local_part
from forerun.models import Policy
from forerun.models.logprobs import (
    TokenBatch,
    completion_logits,
    microbatches,
    packed_batch,
    token_batch,
    token_entropy,
    token_logprobs,
)
from forerun.types import Rollout

SHARDS = "learner"  # folder of a checkpoint in which ranks keep theirs


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


@dataclass(frozen=True, slots=True)
class Update:
    """All that an update is made of, settled before its first pass."""

    rollouts: Sequence[Rollout]
    targets: Targets
    chunks: list[list[int]]  # rollouts of each optimizer step; a step that would have none is left out
    size: float  # completion tokens by which the loss of each chunk is divided
    metrics: dict[str, float]  # of the off-policy correction


@dataclass(slots=True)
class Tally:
    """Sums over the completion tokens of an update, and the gradient's norm at each optimizer step."""

    loss: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    kl: float = 0.0
    tokens: float = 0.0
    norms: list[float] = field(default_factory=list)


def plan_update(config: TrainConfig, rollouts: Sequence[Rollout], advantages: Tensor, scored: Scored) -> Update:
    """Weigh and choose what teaches. `advantages` is [P·n]."""
    lengths = [len(r.tokens) for r in rollouts]
    correction = correct(config, torch.cat(scored.logprobs), _by_the_engine(rollouts), lengths)
    spread = [a.expand(n) for a, n in zip(advantages.cpu(), lengths, strict=True)]
    targets = Targets(scored.logprobs, scored.reference, spread, correction.weights.split(lengths))
    taught = [bool(x.any() and w.any()) for x, w in zip(targets.advantages, targets.correction, strict=True)]
    order = [i for i in range(len(rollouts)) if taught[i] or scored.reference is not None]
    chunks = [order[u :: config.updates_per_step] for u in range(config.updates_per_step)]
    size = sum(lengths) / len(chunks)
    return Update(rollouts, targets, [c for c in chunks if c], size, correction.metrics(lengths))


def update_metrics(
    config: TrainConfig, update: Update, tally: Tally, learning_rate: float, scored: Scored
) -> dict[str, float]:
    """What `Learner.update` returns."""
    tokens = max(1.0, tally.tokens)
    return {
        "policy/loss": tally.loss / config.updates_per_step,
        "policy/grad_norm": sum(tally.norms) / max(1, len(tally.norms)),
        "policy/lr": learning_rate,
        "policy/ratio_mean": tally.ratio / tokens if update.chunks else 1.0,
        "policy/clip_low": tally.low / tokens,
        "policy/clip_high": tally.high / tokens,
        "policy/kl": tally.kl / tokens,
        "policy/entropy": scored.entropy,
        **update.metrics,
    }


class Learner:
    """Trains the live policy module; the engine sees every update at once because it runs the same parameters."""

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        temperature: float,
        reference: Any | None = None,
        most: Callable[[int], int] = lambda number: number,
    ) -> None:
        """See the class.

        Args:
            reference: model for the KL penalty; None: a copy of the policy as it is, where `config` asks for a penalty
                (with an adapter no copy: the policy without it).
            most: the largest of the numbers that all ranks of a sharded learner give here; alone, one's own.

        Raises:
            UserError: the policy cannot be packed, or cannot be adapted as `config.lora` says.
        """
        self.policy, self.config = policy, config
        self.temperature, self.most = temperature, most
        self.adapter = None if config.lora is None else LoraAdapter(policy.model, config.lora)
        trained = policy.model if self.adapter is None else self.adapter
        self.optimizer = MasterOptimizer(trained.parameters(), config)
        if reference is None and config.kl > 0 and self.adapter is None:
            reference = copy.deepcopy(policy.model).requires_grad_(False)
        self.reference = reference
        if config.packing:
            require_packing(policy)
            if self.reference is not None:
                attend_by_sequence(self.reference)
        if config.gradient_checkpointing:
            _enable_checkpointing(policy.model)

    @torch.no_grad()
    def score(
        self, rollouts: Sequence[Rollout], forward: Callable[[Any, TokenBatch], Tensor] = completion_logits
    ) -> Counting[Scored]:
        """Recompute every token's log-probability under the current policy (and the reference).

        Args:
            forward: runs the policy's own batches, and may keep what else it sees there (`learner/cotrain.py`). Any
                other than the default is given one sequence per row, also where the recipe packs.
        """
        own, entropies = [torch.empty(0)] * len(rollouts), [torch.empty(0)] * len(rollouts)
        adapted = self.adapter is not None and self.config.kl > 0
        reference = list(own) if adapted or self.reference is not None else None
        entropy_sum, done = 0.0, 0
        packed = self.config.packing and forward is completion_logits
        for rows, batch in self._batches(rollouts, range(len(rollouts)), packed):
            logits = forward(self.policy.model, batch)
            _scatter(token_logprobs(logits, batch.targets, self.temperature), rows, rollouts, own)
            entropy = token_entropy(logits, self.temperature)
            _scatter(entropy, rows, rollouts, entropies)
            entropy_sum += float(entropy.sum())
            if reference is not None:
                logits = self._reference_logits(batch)
                _scatter(token_logprobs(logits, batch.targets, self.temperature), rows, rollouts, reference)
            done += len(rows)
            yield done
        mean = entropy_sum / max(1, sum(len(r.tokens) for r in rollouts))
        return Scored(own, reference, mean, [float(e.mean()) for e in entropies])

    def update(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,  # [P·n]
        scored: Scored,
        learning_rate: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Counting[dict[str, float]]:
        """Update the policy on one batch; returns metrics.

        Raises:
            Interrupted: `stop_requested` before the first optimizer step; the policy is as it was.
            UserError: the loss or the gradient is not finite; the policy is as it was before this optimizer step.
        """
        update = plan_update(self.config, rollouts, advantages, scored)
        tally = yield from self.apply(update, learning_rate, stop_requested)
        return update_metrics(self.config, update, tally, learning_rate, scored)

    def apply(
        self, update: Update, learning_rate: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> Counting[Tally]:
        """Carry out an update, or this rank's part of one. Raises as `update` does, on all ranks or on none."""
        tally, done = Tally(), 0
        for number, chunk in enumerate(update.chunks):
            for rows, batch in self._batches(update.rollouts, chunk, self.config.packing):
                if number == 0 and self.most(int(stop_requested())):
                    self.optimizer.clear()
                    raise Interrupted
                self._accumulate(batch, rows, update.targets, update.size, tally)
                done += len(rows)
                yield done
            tally.norms.append(self._step(learning_rate))
        return tally

    def save(self, folder: Path) -> None:
        """Write the optimizer with its masters, the adapter, and the reference, into the folder of a checkpoint."""
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        if self.adapter is not None:
            self.adapter.save(folder / "adapter", None)
            save_settings(folder, self.adapter.config)
        if self.reference is not None:
            torch.save(self.reference.state_dict(), folder / "reference.pt")

    def restore(self, folder: Path) -> None:
        """Go on from what this class, or the ranks of a sharded learner, saved."""
        if (folder / SHARDS).is_dir():
            from forerun.learner.fsdp import load_shards  # torch's distributed checkpoints load slowly

            load_shards(folder / SHARDS, self.policy.model, self.optimizer, self.reference, alone=True)
            return
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        if self.adapter is not None:
            self.adapter.merge(self.optimizer.updates)
        if self.reference is not None and (folder / "reference.pt").exists():
            self.reference.load_state_dict(torch.load(folder / "reference.pt", weights_only=True))

    def close(self) -> None:
        """Leave the policy as it was found, but for what it has learnt; the twin of `LearnerGroup.close`."""
        if self.adapter is not None:
            self.adapter.close()

    def _reference_logits(self, batch: TokenBatch) -> Tensor:  # [M, V]
        if self.reference is not None or self.adapter is None:
            return completion_logits(self.reference, batch)
        with self.adapter.left_out():
            return completion_logits(self.policy.model, batch)

    def _accumulate(self, batch: TokenBatch, rows: list[int], targets: Targets, size: float, tally: Tally) -> None:
        """Forward and backward of one micro-batch; its loss is a sum over tokens divided by `size`."""

        def of(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([parts[i] for i in rows] or [torch.empty(0)]).to(self.policy.device)

        config, old = self.config, of(targets.old)
        logprobs = token_logprobs(completion_logits(self.policy.model, batch), batch.targets, self.temperature)
        correction, advantages = of(targets.correction), of(targets.advantages)
        terms = clipped_policy_loss(logprobs, old, advantages, config.clip_low, config.clip_high, correction)
        loss = terms.loss.sum() / size
        if targets.reference is not None:
            kl = kl_k3(logprobs, of(targets.reference))
            loss = loss + config.kl * kl.sum() / size
            tally.kl += float(kl.detach().sum())
        loss.backward()
        tally.loss += float(loss.detach())
        tally.ratio += float(terms.ratio.sum())
        tally.low += float(terms.clipped_low.sum())
        tally.high += float(terms.clipped_high.sum())
        tally.tokens += len(old)

    def _step(self, learning_rate: float) -> float:
        if self.adapter is not None:
            self.adapter.require_gradients()
        gradients = [local_part(m.grad) for m in self.optimizer.masters if m.grad is not None]
        if self.most(int(not all(bool(torch.isfinite(g).all()) for g in gradients))):
            self.optimizer.clear()
            raise UserError(
                "The policy's gradient is not finite; nothing was updated. Lower train.learning_rate, "
                "or use policy.dtype=float32"
            )
        norm = self.optimizer.step(learning_rate)
        if self.adapter is not None:
            self.adapter.merge(self.optimizer.updates)
        return norm

    def _batches(
        self, rollouts: Sequence[Rollout], chosen: Sequence[int], packed: bool
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        """Micro-batches of the chosen rollouts, each with their numbers in the order of its completions."""
        pairs = [(rollouts[i].prompt_ids, rollouts[i].tokens) for i in chosen]
        lengths, tokens = [len(prompt) + len(completion) for prompt, completion in pairs], self.config.microbatch_tokens
        if packed:
            groups = packed_microbatches(lengths, tokens)
        else:
            groups = [[[j] for j in group] for group in microbatches(lengths, tokens)]
        missing = self.most(len(groups)) - len(groups)  # asked by all ranks before their first pass
        for group in groups:
            batch = packed_batch([[pairs[j] for j in row] for row in group], self.policy.device)
            yield [chosen[j] for row in group for j in row], batch if packed else replace(batch, position_ids=None)
        for _ in range(missing):
            yield [], token_batch([([0], [])], self.policy.device)  # a pass that all ranks run and nobody learns from


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
