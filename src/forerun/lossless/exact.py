"""Exact next-token probabilities of the policy along given texts (teacher forcing), without a drafter in the loop.

A context is read once and its cache row copied, so that each of thousands of short continuations costs one short pass.
Axes: N texts, L tokens each, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forerun.drafters import Drafter, Rows
from forerun.models import Policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import PolicyForward
from forerun.types import Draft, Rollout

_ROWS = 32  # texts per pass
CANDIDATES = 3  # positions of a rollout where drafts are tried


@dataclass(frozen=True, slots=True)
class Exact:
    """The policy's distribution at every token of N texts, given the tokens before it. Float64 numpy, [N, L]."""

    above: np.ndarray  # mass of the tokens that are likelier (ties: of smaller id)
    p: np.ndarray  # of the token itself
    surprise: np.ndarray  # -log p minus its own expectation: zero mean under the policy
    variance: np.ndarray  # of -log p under the policy


def exact_rows(policy: Policy, context: list[int], texts: Tensor, temperature: float) -> Exact:
    """Exact distributions along continuations `texts` [N, L] of one context, at a temperature above 0."""
    last = torch.full((len(texts), 1), context[-1])
    parts = [
        _read(read.logits, texts[read.part].to(policy.device), temperature)
        for read in _continuations(policy, context, torch.cat([last, texts[:, :-1]], 1))
    ]
    return Exact(*(np.concatenate(values) for values in zip(*parts, strict=True)))


@torch.no_grad()
def next_rows(
    policy: Policy, drafter: Drafter, context: list[int], prefixes: list[list[int]], temperature: float
) -> tuple[Tensor, Tensor]:
    """Next-token distributions of policy and drafter after context + prefix, each prefix read afresh.

    The q of a round may differ (the drafter then continues its own guesses); a test may use any function of the text.

    Returns:
        The policy's log-probabilities and the drafter's q, one-hot where it is deterministic: [N, V] float32 each.
    """
    width = 1 + max(len(prefix) for prefix in prefixes)
    inputs = torch.tensor([[context[-1], *prefix, *[0] * (width - 1 - len(prefix))] for prefix in prefixes])
    ends = torch.tensor([len(prefix) for prefix in prefixes], device=policy.device)
    log_p, q = [], []
    for read in _continuations(policy, context, inputs, drafter.aux_layers):
        end = ends[read.part]
        rows = read.logits[torch.arange(len(end)), end].float()
        log_p.append(torch.log_softmax(rows / temperature, -1).cpu())
        tokens = inputs[read.part].to(policy.device)
        tokens = torch.cat([tokens.new_tensor(context[:-1]).expand(len(end), -1), tokens], 1)
        draft = _first_draft(drafter, tokens, len(context) + end, read.features, temperature)
        q.append(_dense_q(draft, policy.model.config.get_text_config().vocab_size))
    return torch.cat(log_p), torch.cat(q)


@torch.no_grad()
def disputed_contexts(
    policy: Policy, drafter: Drafter, rollouts: Sequence[Rollout], count: int, temperature: float
) -> list[list[int]]:
    """Up to `count` contexts, one per prompt, where a wrong rule shows most.

    They are cut from plain rollouts at whichever of the CANDIDATES least certain tokens the output distribution would
    change most if rejected drafts were replaced from p.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt_index, []).append(rollout)
    best = [_most_disputed(policy, drafter, group, temperature) for group in groups.values()]
    return [context for _, context in sorted(best, reverse=True)[:count]]


def _most_disputed(
    policy: Policy, drafter: Drafter, group: Sequence[Rollout], temperature: float
) -> tuple[float, list[int]]:
    """The largest total variation at stake among rollouts of one prompt, and its context."""
    prompt, width = group[0].prompt_ids, max(len(r.tokens) for r in group)
    inputs = torch.tensor([[prompt[-1], *r.tokens[:-1], *[0] * (width - len(r.tokens))] for r in group])
    found: list[tuple[float, list[int]]] = []
    for read in _continuations(policy, prompt, inputs, drafter.aux_layers):
        for row, rollout in enumerate(group[read.part]):
            log_p = torch.log_softmax(read.logits[row, : len(rollout.tokens)].float() / temperature, -1)
            entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
            for at in entropy.topk(min(CANDIDATES, len(entropy))).indices.tolist():
                context = prompt + rollout.tokens[:at]
                features = None if read.features is None else read.features[row : row + 1, : len(context)]
                text, length = torch.tensor([context], device=policy.device), torch.tensor([len(context)])
                draft = _first_draft(drafter, text, length.to(policy.device), features, temperature)
                q = _dense_q(draft, log_p.shape[1])[0]
                p = log_p[at].exp().cpu()
                accepted = torch.minimum(p, q)  # 0 without a draft
                found.append((0.5 * float((accepted - accepted.sum() * p).abs().sum()), context))
    return max(found)


@dataclass(frozen=True, slots=True)
class Read:
    """One pass of the policy over a part of the continuations."""

    part: slice
    logits: Tensor  # [b, L, V]
    features: Tensor | None  # [b, C - 1 + L, T·H] at the taps, the context's among them


@torch.no_grad()
def _continuations(
    policy: Policy, context: list[int], inputs: Tensor, aux_layers: tuple[int, ...] = ()
) -> Iterator[Read]:
    """Run `inputs` [N, L], whose first column is the last of the context's C tokens, a few rows at a time."""
    forward, device = PolicyForward(policy, aux_layers), policy.device
    count, length = inputs.shape
    rows, known = min(_ROWS, count), len(context) - 1
    cache, before = SlotCache(rows, known + length), None
    if known:
        ids = torch.tensor([context[:-1]], device=device)
        start = torch.zeros(1, dtype=torch.int64, device=device)
        slots = SlotPass(cache, 0, start, known, known, fresh=True)
        _, before = forward(ids, slots, head=False)
        slots.keep()
        for row in range(1, rows):
            cache.copy(0, row, known)
    for first in range(0, count, rows):
        part = inputs[first : first + rows].to(device)
        starts = torch.full((len(part),), known, device=device)
        logits, features = forward(part, SlotPass(cache, 0, starts, length, known + length))
        assert logits is not None
        if features is not None and before is not None:
            features = torch.cat([before.expand(len(part), -1, -1), features], 1)
        yield Read(slice(first, first + len(part)), logits, features)


def _first_draft(
    drafter: Drafter, tokens: Tensor, lengths: Tensor, features: Tensor | None, temperature: float
) -> Draft:
    """One token drafted after each of tokens [N, L] of `lengths` [N]."""
    drafter.open(len(tokens), tokens.shape[1] + 2, 1)
    drafter.prefill(0, tokens, lengths, None if features is None else features[:, :-1])
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    temperatures = torch.full((len(tokens),), temperature, device=tokens.device)
    return drafter.propose(Rows(last, lengths - 1, torch.zeros_like(lengths), temperatures), torch.ones_like(lengths))


def _dense_q(draft: Draft, vocabulary: int) -> Tensor:
    """q of the first slot over the whole vocabulary: [N, V] float32; zero where nothing was drafted."""
    q = torch.zeros(len(draft.lengths), vocabulary)
    if draft.tokens.shape[1] == 0:
        return q
    if draft.log_q is None:
        drafted = draft.lengths.cpu() > 0
        q[drafted] = q[drafted].scatter(1, draft.tokens.cpu()[drafted, :1], 1.0)
        return q
    columns = torch.arange(vocabulary) if draft.vocabulary is None else draft.vocabulary.cpu()
    return q.index_copy(1, columns, draft.log_q[:, 0].float().exp().cpu())


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


def float32_copy(policy: Policy) -> Policy:
    """The same weights computed with in float32."""
    return Policy(copy.deepcopy(policy.model).float(), policy.tokenizer, policy.name)


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
    _read_prompts(forward, cache, ids, [n - 1 for n in prompts])
    parts = []
    place = torch.arange(rows, device=device)
    for step in range(steps):
        at = (starts + step * rows)[:, None] + place  # [B, rows]
        slots = SlotPass(cache, 0, at[:, 0], rows, int(at.max()) + 1)
        logits, _ = forward(ids.gather(1, at), slots)
        slots.keep()
        assert logits is not None
        log_p = torch.log_softmax(logits.float() / temperature, -1)
        parts.append(log_p.gather(2, ids.gather(1, (at + 1).clamp(max=width - 1))[..., None])[..., 0])
    values = torch.cat(parts, 1).double().cpu().numpy()
    return [values[row, : len(r.tokens)] for row, r in enumerate(rollouts)]


def _read_prompts(forward: PolicyForward, cache: SlotCache, ids: Tensor, lengths: list[int]) -> None:
    """Run the first lengths[b] tokens of every row, together where padding cannot enter a state."""
    rows = [(row, row + 1) for row in range(len(lengths))] if forward.recurrent else [(0, len(lengths))]
    for first, end in rows:
        if read := max(lengths[first:end]):
            starts = torch.zeros(end - first, dtype=torch.int64, device=ids.device)
            slots = SlotPass(cache, first, starts, read, read, fresh=True)
            forward(ids[first:end, :read], slots, head=False)
            slots.keep()
