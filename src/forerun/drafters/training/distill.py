"""A draft model distilled from the policy: some of its layers, trained on its own rollouts.

At every completion token a loss of `losses.py` pulls the copy's q towards the policy's p. As long as its drafts are
accepted, a chain of drafts reads what training reads, the policy's own tokens: no unroll is needed. The policy's rows
are not kept between epochs: at full vocabulary they rarely fit.
Axes: M completion tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forerun.config import DraftConfig
from forerun.drafters.training.heads import autocast_of, split_pairs
from forerun.drafters.training.losses import acceptance, row_loss
from forerun.drafters.training.trainer import Pair, Training, TrainingSetup, Validation, fit
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.auxiliary import decoder_layers
from forerun.models.logprobs import completion_logits, microbatches, token_batch

ROW_BYTES = 2**28  # of one [M, V] float32 tensor in a pass; larger batches accumulate their gradient


def pruned_copy(policy: Policy, layers: Sequence[int]) -> Any:
    """A float32 copy of the policy's module that keeps only the decoder layers `layers`, in this order.

    Weights are copied, tied where the policy ties them; nothing is shared with the policy.

    Raises UserError when no layer is chosen, or one that the policy does not have.
    """
    count = len(decoder_layers(policy.model))
    if not layers or not all(0 <= layer < count for layer in layers):
        raise UserError(
            f"Cannot keep layers {list(layers)} of a policy with layers 0 to {count - 1}; name some of those"
        )
    config = deepcopy(policy.model.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = [text.layer_types[layer] for layer in layers]
    with torch.device(policy.device):
        model = type(policy.model)(config).float()
    model.load_state_dict(_renumbered(policy.model, layers))
    return model.eval()


def distill(model: Any, policy: Policy, setup: TrainingSetup) -> Training[Validation]:
    """Train `model` in place, see `fit`.

    Args:
        model: a causal language model with the policy's vocabulary, e.g. from `pruned_copy`.
        setup: of its config, `depth` is how many positions are reported, and counted by loss e2e.
    """
    config, temperature, rng = setup.config, setup.temperature, random.Random(setup.seed)
    held, training = split_pairs(setup.pairs, config.validation, rng)
    batches = microbatches([len(p) + len(c) for p, c in training], config.batch_tokens)

    def backward(rows: list[int]) -> float:
        return _backward(model, policy, [training[i] for i in rows], config, temperature)

    validation = partial(validate, model, policy, held, config, temperature)
    return (yield from fit(model, batches, setup, rng, backward, validation))


@torch.no_grad()
def validate(model: Any, policy: Policy, pairs: Sequence[Pair], config: DraftConfig, temperature: float) -> Validation:
    """Acceptance Σ min(p, q) on rollouts that were not trained on, by draft position.

    Draft j of a round is j or more tokens after the prompt; a token later in its completion counts for all j that
    can reach it, as in the training of an EAGLE-3 head.
    """
    sums, counts = [0.0] * config.depth, [0] * config.depth
    for part in _passes(pairs, policy):
        log_p, log_q, _ = _rows(model, policy, part, temperature)
        place = torch.cat([torch.arange(len(completion)) for _, completion in part]).to(log_p.device)  # [M]
        kept = acceptance(log_p, log_q)
        for j in range(config.depth):
            sums[j] += float(kept[place >= j].sum())
            counts[j] += int((place >= j).sum())
    return Validation.of([s / c for s, c in zip(sums, counts, strict=True) if c])


def _backward(model: Any, policy: Policy, pairs: Sequence[Pair], config: DraftConfig, temperature: float) -> float:
    """Add the gradient of the batch's loss, in passes that fit; returns that loss.

    It is the mean over all completion tokens; of loss e2e the mean over draft positions of that over all chains.
    """
    counts = [sum(max(0, len(completion) - j) for _, completion in pairs) for j in range(config.depth)]
    counts, mean = [count for count in counts if count], 0.0
    for part in _passes(pairs, policy):
        log_p, log_q, tokens = _rows(model, policy, part, temperature)
        if config.loss == "e2e":
            left = torch.cat([torch.arange(len(completion), 0, -1) for _, completion in part]).to(log_p.device)
            sums = chain_losses(acceptance(log_p, log_q), left, len(counts))
            loss = torch.stack([s / n for s, n in zip(sums, counts, strict=True)]).mean()
        else:
            loss = row_loss(config.loss, log_p, log_q, tokens).sum() / counts[0]
        loss.backward()
        mean += float(loss.detach())
    return mean


def chain_losses(overlap: Tensor, left: Tensor, depth: int) -> list[Tensor]:
    """End-to-end total variation (`losses.position_loss`): per draft position j the sum over all chains of j + 1.

    Args:
        overlap: [M], Σ min(p, q) of every completion token. left: [M], tokens of its completion from it on.
    """
    alive, sums = torch.ones_like(overlap), []
    for j in range(depth):
        alive = alive * overlap.roll(-j)  # what comes round the end belongs to no chain
        sums.append((1 - alive)[left > j].sum())
    return sums


def _rows(model: Any, policy: Policy, pairs: Sequence[Pair], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every completion token: log p of the policy, detached, log q of the model, [M, V] float32, and its id [M]."""
    batch = token_batch(pairs, policy.device)
    with torch.no_grad():
        log_p = torch.log_softmax(completion_logits(policy.model, batch).float() / (temperature or 1.0), dim=-1)
    with autocast_of(policy):
        logits = completion_logits(model, batch)
    return log_p, torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1), batch.targets


def _passes(pairs: Sequence[Pair], policy: Policy) -> list[list[Pair]]:
    """Pairs in groups whose [M, V] tensors stay within `ROW_BYTES` (a longer pair is a group of its own)."""
    tokens = ROW_BYTES // (4 * policy.model.config.get_text_config().vocab_size)
    groups = microbatches([len(p) + len(c) for p, c in pairs], max(1, tokens))
    return [[pairs[i] for i in group] for group in groups]


def _renumbered(model: Any, layers: Sequence[int]) -> dict[str, Tensor]:
    """The state of a model with only `layers`, named as in a model that never had others."""
    stack = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    state = model.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    for new, old in enumerate(layers):
        start = f"{prefix}{old}."
        kept |= {f"{prefix}{new}.{n.removeprefix(start)}": t for n, t in state.items() if n.startswith(start)}
    return kept
