"""The policy's own word on given texts: exact next-token distributions along them, without any drafter.

A context is read once and its cache row copied, so that thousands of short continuations cost one short pass each.
Axes: N texts, L tokens each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forerun.draft import Drafter, Rows
from forerun.models import Policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import PolicyForward
from forerun.records import Rollout

_ROWS = 32  # texts per pass


@dataclass(frozen=True, slots=True)
class Exact:
    """What the policy says of every token of N texts, given the tokens before it. Float64 numpy, [N, L]."""

    above: np.ndarray  # mass of the tokens that are likelier (ties: of smaller id)
    p: np.ndarray  # of the token itself
    surprise: np.ndarray  # -log p minus its own expectation: zero mean under the policy
    variance: np.ndarray  # of -log p under the policy


def exact_rows(policy: Policy, context: list[int], texts: Tensor, temperature: float) -> Exact:
    """Exact distributions along continuations `texts` [N, L] of one context, at a temperature above 0."""
    last = torch.full((len(texts), 1), context[-1])
    parts = [
        _read(logits, texts[part].to(logits.device), temperature)
        for part, logits in _continuations(policy, context, torch.cat([last, texts[:, :-1]], 1))
    ]
    return Exact(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def next_rows(policy: Policy, context: list[int], prefixes: list[list[int]], temperature: float) -> Tensor:
    """Log-probabilities of the token after context + prefix, for each prefix: [N, V] float32."""
    width = 1 + max(len(prefix) for prefix in prefixes)
    inputs = torch.tensor([[context[-1], *prefix, *[0] * (width - 1 - len(prefix))] for prefix in prefixes])
    at = torch.tensor([len(prefix) for prefix in prefixes])
    rows = [
        torch.log_softmax(logits[torch.arange(len(logits)), at[part]].float() / temperature, -1).cpu()
        for part, logits in _continuations(policy, context, inputs)
    ]
    return torch.cat(rows)


@torch.no_grad()
def _continuations(policy: Policy, context: list[int], inputs: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits [b, L, V] of `inputs` [N, L], whose first column is the context's last token, a few rows at a time."""
    forward, device = PolicyForward(policy, ()), policy.device
    count, length = inputs.shape
    rows, read = min(_ROWS, count), len(context) - 1
    cache = SlotCache(rows, read + length)
    if read:
        ids = torch.tensor([context[:-1]], device=device)
        start = torch.zeros(1, dtype=torch.int64, device=device)
        forward(ids, SlotPass(cache, 0, start, read, read, fresh=True), head=False)
        for row in range(1, rows):
            cache.copy(0, row, read)
    for first in range(0, count, rows):
        part = inputs[first : first + rows].to(device)
        starts = torch.full((len(part),), read, device=device)
        logits, _ = forward(part, SlotPass(cache, 0, starts, length, read + length))
        assert logits is not None
        yield slice(first, first + len(part)), logits


def _read(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[np.ndarray, ...]:
    """The fields of `Exact` for logits [b, L, V] and tokens [b, L]."""
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    p = log_p.exp()
    own = log_p.gather(2, tokens[..., None])  # [b, L, 1]
    ids = torch.arange(log_p.shape[2], device=log_p.device)
    before = (log_p > own) | ((log_p == own) & (ids < tokens[..., None]))
    entropy = -(p * log_p.clamp(min=-1e4)).sum(-1)
    variance = (p * (log_p.clamp(min=-1e4) + entropy[..., None]).square()).sum(-1)
    above = (p.double() * before).sum(-1)
    fields = (above, own[..., 0].double().exp(), -own[..., 0].double() - entropy, variance)
    return tuple(field.double().cpu().numpy() for field in fields)


@torch.no_grad()
def draft_rows(policy: Policy, drafter: Drafter, texts: list[list[int]], temperature: float) -> Tensor:
    """What the drafter expects after each text, read afresh: q as [N, V] float32, one-hot where it is deterministic.

    The q of a round may differ (the drafter then continues its own guesses); a test may use any function of the text.
    """
    forward, device = PolicyForward(policy, drafter.taps), policy.device
    lengths = torch.tensor([len(text) for text in texts], device=device)
    width = int(lengths.max())
    tokens = torch.zeros(len(texts), width, dtype=torch.int64, device=device)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    cache, starts = SlotCache(len(texts), width), torch.zeros_like(lengths)
    slots = SlotPass(cache, 0, starts, width - 1, width - 1, fresh=True)
    _, features = forward(tokens[:, :-1], slots, head=False)
    drafter.open(len(texts), width + 2, 1)
    drafter.prefill(0, tokens, lengths, features)
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    heat = torch.full((len(texts),), temperature, device=device)
    draft = drafter.propose(Rows(last, lengths - 1, torch.zeros_like(lengths), heat), torch.ones_like(lengths))
    q = torch.zeros(len(texts), policy.model.config.get_text_config().vocab_size)
    if draft.tokens.shape[1] == 0:
        return q
    if draft.log_q is None:
        drafted = draft.lengths.cpu() > 0
        q[drafted] = q[drafted].scatter(1, draft.tokens.cpu()[drafted, :1], 1.0)
        return q
    rows = draft.log_q[:, 0].float().exp().cpu()
    columns = torch.arange(q.shape[1]) if draft.vocabulary is None else draft.vocabulary.cpu()
    return q.index_copy(1, columns, rows)


@torch.no_grad()
def replay(policy: Policy, rollouts: Sequence[Rollout], rows: int, slots: int, temperature: float) -> list[np.ndarray]:
    """Log-probabilities of given completions when decoded again, `rows` tokens per pass, `slots` sequences a pass.

    rows = 1 is what plain decoding computes, rows = k + 1 what verification does. One array [T_i] per rollout.
    """
    forward = PolicyForward(policy, ())
    return [
        values
        for start in range(0, len(rollouts), slots)
        for values in _replay(forward, rollouts[start : start + slots], rows, temperature or 1.0)
    ]


def _replay(forward: PolicyForward, rollouts: Sequence[Rollout], rows: int, temperature: float) -> list[np.ndarray]:
    device = forward.policy.device
    prompts = [len(r.prompt_ids) for r in rollouts]
    steps = -(-max(len(r.tokens) for r in rollouts) // rows)
    width = max(prompts) + steps * rows
    ids = torch.zeros(len(rollouts), width, dtype=torch.int64, device=device)
    for row, rollout in enumerate(rollouts):
        text = rollout.prompt_ids + rollout.tokens
        ids[row, : len(text)] = torch.tensor(text)
    cache, starts = SlotCache(len(rollouts), width + rows), torch.tensor(prompts, device=device) - 1
    read = max(prompts) - 1
    if read:
        forward(ids[:, :read], SlotPass(cache, 0, torch.zeros_like(starts), read, read, fresh=True), head=False)
    parts = []
    place = torch.arange(rows, device=device)
    for step in range(steps):
        at = (starts + step * rows)[:, None] + place  # [B, rows]
        logits, _ = forward(ids.gather(1, at), SlotPass(cache, 0, at[:, 0], rows, int(at.max()) + 1))
        assert logits is not None
        log_p = torch.log_softmax(logits.float() / temperature, -1)
        parts.append(log_p.gather(2, ids.gather(1, (at + 1).clamp(max=width - 1))[..., None])[..., 0])
    values = torch.cat(parts, 1).double().cpu().numpy()
    return [values[row, : len(r.tokens)] for row, r in enumerate(rollouts)]
