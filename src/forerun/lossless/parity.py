"""Two claims about numbers: greedy text is the policy's argmax, and reported log-probabilities are the policy's.

A forward of k+1 rows rounds otherwise than one of a single row, as does a forward of another batch size. The right
null is therefore plain against plain at another batch size: speculation may differ from plain decoding by what plain
decoding differs from itself, times SLACK. Where a greedy text leaves the plain one, the two likeliest tokens must have
been a near-tie of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forerun.engine import RolloutEngine, Sampling
from forerun.lossless.exact import replay
from forerun.lossless.verdict import Check
from forerun.models import Policy
from forerun.models.logprobs import completion_logits, token_batch, token_logprobs
from forerun.types import Rollout

SLACK = 3.0
FLOOR = {torch.float32: 1e-9, torch.bfloat16: 1e-5}  # of KL, nats a token: where even the null rounds to nothing


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two sets of log-probabilities of the same tokens are apart."""

    mean: float  # |difference|, nats
    p99: float
    max: float
    kl: float  # k3 estimate, nats a token

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, p99 {self.p99:.2g}, max {self.max:.2g}, KL {self.kl:.2g}"


def gap(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Gap:
    """Differences other - one over all tokens."""
    difference = np.concatenate(other) - np.concatenate(one)
    size = np.abs(difference)
    kl = float((np.expm1(difference) - difference).mean())
    return Gap(float(size.mean()), float(np.quantile(size, 0.99)), float(size.max()), kl)


def parity_checks(policy: Policy, rollouts: Sequence[Rollout], k: int, slots: int, temperature: float) -> list[Check]:
    """Log-probabilities of speculative rollouts: replayed plainly, as verified rows, by the learner, as reported."""
    reported = [np.array(r.logprobs) for r in rollouts]
    plain = replay(policy, rollouts, 1, slots, temperature)
    others = (max(1, slots // 2), 2 * slots)[: 1 if len(rollouts) <= slots else 2]  # batches that come out otherwise
    nulls = [gap(plain, replay(policy, rollouts, 1, other, temperature)) for other in others]
    null = max(nulls, key=lambda g: g.kl)
    verified = replay(policy, rollouts, k + 1, slots, temperature)
    bound = SLACK * null.kl + FLOOR.get(policy.dtype, 1e-5)
    compared = {
        "verified rows against plain rows": gap(plain, verified),
        "learner against plain rows": gap(plain, learner_logprobs(policy, rollouts, temperature)),
        "reported against verified rows": gap(verified, reported),
    }
    return [_parity(name, seen, null, bound) for name, seen in compared.items()]


def learner_logprobs(policy: Policy, rollouts: Sequence[Rollout], temperature: float) -> list[np.ndarray]:
    """Log-probabilities as the learner computes them, a few rollouts at a time."""
    values = []
    for start in range(0, len(rollouts), 8):
        part = rollouts[start : start + 8]
        batch = token_batch([(r.prompt_ids, r.tokens) for r in part], policy.device)
        with torch.no_grad():
            logprobs = token_logprobs(completion_logits(policy.model, batch), batch.targets, temperature)
        values += [x.double().cpu().numpy() for x in logprobs.split([len(r.tokens) for r in part])]
    return values


def _parity(name: str, seen: Gap, null: Gap, bound: float) -> Check:
    numbers = {field: getattr(seen, field) for field in Gap.__slots__}
    numbers |= {f"null_{field}": getattr(null, field) for field in Gap.__slots__} | {"bound_kl": bound}
    sentence = f"{seen} nats; plain at another batch size: {null}; allowed KL {bound:.2g}"
    return Check(name, seen.kl <= bound, sentence, numbers)


def greedy_checks(
    plain: RolloutEngine, speculative: RolloutEngine, policy: Policy, prompts: list[list[int]], tokens: int, k: int
) -> list[Check]:
    """Greedy text of both engines; where they part, the margin of the policy's two likeliest tokens."""
    sampling = Sampling(tokens, 0.0, 0)
    ours, theirs = (sorted(e.stream(prompts, sampling), key=lambda r: r.prompt_index) for e in (speculative, plain))
    margins = [m for a, b in zip(ours, theirs, strict=True) if (m := parting_margin(policy, a, b)) is not None]
    noise = _row_noise(policy, theirs, k) if margins else 0.0  # identical texts need no excuse
    same = len(prompts) - len(margins)
    worst = max(margins, default=0.0)
    sentence = f"{same} of {len(prompts)} texts identical over {tokens} tokens in {str(policy.dtype)[6:]}"
    if margins:
        sentence += f"; the others part at near-ties: margins up to {worst:.3g} nats, rounding explains {2 * noise:.3g}"
    numbers = {"identical": same, "prompts": len(prompts), "worst_margin": worst, "noise": noise}
    return [Check(f"greedy text, {str(policy.dtype)[6:]}", worst <= 2 * noise, sentence, numbers)]


def _row_noise(policy: Policy, rollouts: Sequence[Rollout], k: int) -> float:
    """Largest change of a log-probability between one row and k+1 rows a pass, over texts that were decoded plainly."""
    return gap(replay(policy, rollouts, 1, 8, 1.0), replay(policy, rollouts, k + 1, 8, 1.0)).max


def parting_margin(policy: Policy, one: Rollout, other: Rollout) -> float | None:
    """Log-probability between the policy's two likeliest tokens where two greedy texts part; None if they do not."""
    at = next((t for t, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
    if at is None:
        return None if len(one.tokens) == len(other.tokens) else float("inf")
    batch = token_batch([(one.prompt_ids + one.tokens[:at], [one.tokens[at]])], policy.device)
    with torch.no_grad():
        log_p = torch.log_softmax(completion_logits(policy.model, batch).float(), -1)[0]
    return float(log_p.max() - min(log_p[one.tokens[at]], log_p[other.tokens[at]]))
