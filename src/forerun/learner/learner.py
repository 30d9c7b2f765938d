"""The learner in one process: log-probabilities by the policy itself, and its update.

One batch is P prompts with n samples each, flat: sample i belongs to prompt i // n. Micro-batches hold a bounded number
of tokens; their gradients are summed with one normaliser, that of the whole batch, so that the update does not depend
on how the batch was cut, nor on whether it was packed.
With `train.lora` the adapter's matrices learn in place of the weights (`lora.py`).
The same class is a rank's part of a sharded learner (`worker.py`): all ranks make the same collectives in one order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from forerun.algorithms.losses import batch_loss, loss_fault
from forerun.config import TrainConfig
from forerun.errors import Interrupted, UserError
from forerun.events import CountStream
from forerun.learner.batching import by_rollout, policy_batch, token_batches
from forerun.learner.lora import LoraAdapter, save_settings
from forerun.learner.objective import Objective, Scored, Update, UpdateResult
from forerun.learner.optimizer import MasterOptimizer
from forerun.learner.packing import attend_by_sequence, require_packing
from forerun.learner.parallel import local_part
from forerun.models import Policy
from forerun.models.logprobs import TokenBatch, completion_logits, token_entropy, token_logprobs
from forerun.types import Rollout

SHARDS = "learner"  # folder of a checkpoint in which ranks keep theirs
WEIGHTS = "weights.pt"  # file of a rank\'s initial weights


class Learner:
    """Trains the live policy module; the engine sees every update at once because it runs the same parameters."""

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        temperature: float,
        reference: Any | None = None,
        all_reduce_max: Callable[[int], int] = lambda number: number,
        max_new_tokens: int = 1,
    ) -> None:
        """See the class.

        Args:
            reference: model for the KL penalty; None: a copy of the policy as it is, where `config` asks for a penalty
                (with an adapter no copy: the policy without it).
            all_reduce_max: over the ranks of a sharded learner; in one process the number itself.
            max_new_tokens: of a rollout; algorithms that divide by a constant length divide by it.

        Raises:
            UserError: the policy cannot be packed, or cannot be adapted as `config.lora` says.
        """
        self.policy = policy
        self.config = config
        self.temperature = temperature
        self.all_reduce_max = all_reduce_max
        self.objective = Objective(config, max_new_tokens)
        self.adapter = None if config.lora is None else LoraAdapter(policy.model, config.lora)
        trained = policy.model if self.adapter is None else self.adapter
        self.optimizer = MasterOptimizer(trained.parameters(), config)
        if reference is None and config.kl > 0 and self.adapter is None:
            reference = copy.deepcopy(policy.model).requires_grad_(False)
        self.reference = reference
        if config.packing:
            require_packing(policy, config.microbatch_tokens)
            if self.reference is not None:
                attend_by_sequence(self.reference)
        self._recomputed = _enable_checkpointing(policy.model) if config.gradient_checkpointing else []

    @torch.no_grad()
    def score(
        self, rollouts: Sequence[Rollout], forward: Callable[[Any, TokenBatch], Tensor] = completion_logits
    ) -> CountStream[Scored]:
        """Recompute every token's log-probability under the current policy (and the reference).

        Args:
            forward: runs the policy's own batches, and may keep what else it sees there (`learner/cotrain.py`). Any
                other than the default is given one sequence per row, also where the recipe packs.
        """
        own = [torch.empty(0)] * len(rollouts)
        entropies = [0.0] * len(rollouts)
        adapted = self.adapter is not None and self.config.kl > 0
        reference = list(own) if adapted or self.reference is not None else None
        entropy_sum, done = 0.0, 0
        packed = self.config.packing and forward is completion_logits
        for rows, batch in self._batches(rollouts, range(len(rollouts)), packed):
            logits = forward(self.policy.model, batch)
            logprobs = token_logprobs(logits, batch.targets, self.temperature)
            for i, part in by_rollout(logprobs, rows, rollouts):
                own[i] = part
            entropy = token_entropy(logits, self.temperature)
            entropy_sum += float(entropy.sum())
            for i, part in by_rollout(entropy.cpu(), rows, rollouts):
                entropies[i] = float(part.mean())
            if reference is not None:
                logprobs = token_logprobs(self._reference_logits(batch), batch.targets, self.temperature)
                for i, part in by_rollout(logprobs, rows, rollouts):
                    reference[i] = part
            done += len(rows)
            yield done
        mean = entropy_sum / max(1, sum(len(r.tokens) for r in rollouts))
        return Scored(own, reference, mean, entropies)

    def update(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,  # [P·n]
        scored: Scored,
        learning_rate: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> CountStream[dict[str, float]]:
        """Update the policy on one batch; returns metrics.

        Raises:
            Interrupted: `stop_requested` before the first optimizer step; the policy is as it was.
        """
        update = self.objective.plan(rollouts, advantages, scored)
        result = yield from self.apply(update, learning_rate, stop_requested)
        return self.objective.metrics(update, result, learning_rate, scored)

    def apply(
        self, update: Update, learning_rate: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> CountStream[UpdateResult]:
        """Carry out an update, or this rank's part of one. Raises as `update` does, on all ranks or on none.

        An optimizer step whose loss or gradient is not finite is skipped, on all ranks: the policy is as it was before.
        """
        result, done = UpdateResult(), 0
        for number, chunk in enumerate(update.chunks):
            fault = 0
            for rows, batch in self._batches(update.rollouts, chunk, self.config.packing):
                if number == 0 and self.all_reduce_max(int(stop_requested())):
                    self.optimizer.clear()
                    raise Interrupted
                logprobs = token_logprobs(completion_logits(self.policy.model, batch), batch.targets, self.temperature)
                tokens = policy_batch(logprobs, [update.targets[i] for i in rows])
                loss, sums = batch_loss(self.objective.algorithm, tokens, self.config, update.size)
                fault = max(fault, loss_fault(loss, tokens))
                loss.backward()
                result.add(sums, len(logprobs))
                done += len(rows)
                yield done
            if reason := self._fault(fault):
                self.optimizer.clear()
                result.skipped.append(reason)
                continue
            result.norms.append(self.optimizer.step(learning_rate))
            if self.adapter is not None:
                self.adapter.merge()
        return result

    @property
    def updates(self) -> int:
        """Optimizer steps that the policy has made."""
        return self.optimizer.updates

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
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        if self.adapter is not None:
            self.adapter.merge()
        if self.reference is not None and (folder / "reference.pt").exists():
            self.reference.load_state_dict(torch.load(folder / "reference.pt", map_location="cpu", weights_only=True))

    def close(self) -> None:
        """Leave the policy as it was found, but for what it has learnt; the twin of `LearnerGroup.close`."""
        for layer in self._recomputed:
            vars(layer).pop("forward", None)
        if self.adapter is not None:
            self.adapter.close()

    def _reference_logits(self, batch: TokenBatch) -> Tensor:  # [M, V]
        if self.reference is not None or self.adapter is None:
            return completion_logits(self.reference, batch)
        with self.adapter.left_out():
            return completion_logits(self.policy.model, batch)

    def _fault(self, fault: int) -> int:
        """Before an optimizer step, the same on all ranks: 0, or what is not finite, see `objective.fault_text`.

        Args:
            fault: of the loss on this rank, see `loss_fault`.
        """
        if self.adapter is not None:
            self.adapter.require_gradients()
        gradients = [local_part(m.grad) for m in self.optimizer.masters if m.grad is not None]
        broken = not all(bool(torch.isfinite(g).all()) for g in gradients)
        return self.all_reduce_max(2 * fault + broken)

    def _batches(
        self, rollouts: Sequence[Rollout], chosen: Sequence[int], packed: bool
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        return token_batches(rollouts, chosen, self.config, packed, self.policy.device, self.all_reduce_max)


def _enable_checkpointing(model: Any) -> list[torch.nn.Module]:
    """Recompute layers in the backward pass; those layers.

    Transformers' own switch asks for training mode, where dropout, also that of plain functions, would let the learner
    score another policy than the one that generated.
    """
    layers: list[torch.nn.Module] = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise UserError(
            f"train.gradient_checkpointing=true needs layers that Transformers can recompute, and "
            f"{type(model).__name__} has none; set it to false"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)  # type: ignore[method-assign]
    return layers


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)
