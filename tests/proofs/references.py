"""The acceptance rules for chains and truncated sampling, slow and obvious: one sequence at a time, float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from forerun.acceptance.truncate import Truncation
from forerun.types import Draft, VerifyInput, VerifyResult

Count = Callable[[Tensor, Tensor, list[int], list[float]], tuple[int, float]]


def reference_token(inputs: VerifyInput) -> VerifyResult:
    """Token rejection sampling."""
    return _verify(_token_count, inputs)


def reference_block(inputs: VerifyInput) -> VerifyResult:
    """Block verification; one-hot drafts go by the token rule."""
    return _verify(_token_count if inputs.draft.log_q is None else _block_count, inputs)


def _token_count(p: Tensor, q: Tensor, x: list[int], u: list[float]) -> tuple[int, float]:
    """Accepted count and residual weight from rows p [gamma+1, V], q [gamma, V], tokens and uniforms."""
    for i, token in enumerate(x):
        if u[i] > p[i, token] / q[i, token]:
            return i, 1.0
    return len(x), 1.0


def _block_count(p: Tensor, q: Tensor, x: list[int], u: list[float]) -> tuple[int, float]:
    """Accepted count and residual weight of block verification; arguments as the token rule's."""
    best, weight, prefix = 0, 1.0, 1.0
    for i, token in enumerate(x, start=1):
        prefix = min(prefix * float(p[i - 1, token] / q[i - 1, token]), 1.0)
        threshold = prefix
        if i < len(x):
            mass = float((prefix * p[i] - q[i]).clamp(min=0).sum())
            threshold = 1.0 if mass + 1 - prefix == 0 else mass / (mass + 1 - prefix)
        if u[i - 1] <= threshold:
            best, weight = i, prefix
    return best, weight


def _verify(count: Count, inputs: VerifyInput) -> VerifyResult:
    """Run a count over the batch and finish its rounds."""
    batch, rows, _ = inputs.target_logits.shape
    accepted = torch.zeros(batch, dtype=torch.int64)
    tokens, logprobs = torch.zeros(batch, rows, dtype=torch.int64), torch.zeros(batch, rows)
    for b in range(batch):
        gamma, temperature = int(inputs.draft.lengths[b]), float(inputs.temperature[b])
        logits = inputs.target_logits[b, : gamma + 1].to(torch.float64)
        p = (logits / (temperature or 1.0)).softmax(-1)
        x = inputs.draft.tokens[b, :gamma].tolist()
        if temperature == 0:
            best = logits.argmax(-1).tolist()
            tau = next((i for i in range(gamma) if x[i] != best[i]), gamma)
            following = best[tau]
        else:
            q = _dense_q(inputs.draft, b, p.shape[1])
            tau, weight = count(p, q, x, inputs.accept_uniforms[b].tolist())
            following = _next_token(p, q, tau, weight, float(inputs.residual_uniforms[b]))
        accepted[b], emitted = tau, [*x[:tau], following]
        tokens[b, : tau + 1] = torch.tensor(emitted)
        logprobs[b, : tau + 1] = p[torch.arange(tau + 1), emitted].log().to(torch.float32)
    return VerifyResult(accepted, tokens, logprobs)


def _next_token(p: Tensor, q: Tensor, tau: int, weight: float, u: float) -> int:
    """The token after `tau` accepted ones."""
    left = p[tau] if tau == len(q) else (weight * p[tau] - q[tau]).clamp(min=0)
    left = left if left.sum() > 0 else p[tau]
    return int((left.cumsum(0) > u * left.sum()).nonzero()[0, 0])


def _dense_q(draft: Draft, b: int, size: int) -> Tensor:
    """q rows of one sequence: [gamma, V] float64."""
    gamma = int(draft.lengths[b])
    q = torch.zeros(gamma, size, dtype=torch.float64)
    if draft.log_q is None:
        q[torch.arange(gamma), draft.tokens[b, :gamma]] = 1.0
        return q
    columns = torch.arange(size) if draft.vocabulary is None else draft.vocabulary
    q[:, columns] = draft.log_q[b, :gamma].double().exp()
    return q


def reference_truncate(row: list[float], temperature: float, cuts: Truncation) -> list[float]:
    """Probabilities of one row of logits at a temperature, after the cuts."""
    weights = [torch.tensor(x / temperature, dtype=torch.float64).exp().item() for x in row]
    alive = set(range(len(row)))
    if cuts.top_k:
        last = sorted(weights, reverse=True)[min(cuts.top_k, len(row)) - 1]
        alive = {i for i in alive if weights[i] >= last}
    total, mass, chosen = sum(weights[i] for i in alive), 0.0, set()
    for i in sorted(alive, key=lambda i: (-weights[i], i)):
        if mass < cuts.top_p * total:
            chosen.add(i)
        mass += weights[i]
    chosen = {i for i in chosen if weights[i] >= cuts.min_p * max(weights)}
    left = sum(weights[i] for i in chosen)
    return [weights[i] / left if i in chosen else 0.0 for i in range(len(row))]
