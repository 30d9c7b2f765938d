"""Two claims about numbers: greedy text is the policy's argmax, and reported log-probabilities are the policy's.

A pass of k+1 rows per sequence rounds differently than one of a single row, as does another batch size or the learner's
pass. Two of these may differ by SLACK times what rounding explains, the larger of two measurements: plain rows at two
batch sizes, which on some machines agree to the bit; and, in a reduced number format, twice the error of a computation
to float32 on the same weights, since independent errors add. The error is the median of three computations, so that a
faulty one cannot raise it.

Faults smaller than the rounding of a reduced format show in float32, where verified rows are compared once more. Greedy
texts may part only at a near-tie of the size of the rounding, measured on plain passes of other layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
import torch

from forerun.engine import RolloutEngine, Sampling
from forerun.lossless.exact import float32_copy, replay
from forerun.lossless.verdict import Check
from forerun.models import Policy
from forerun.models.logprobs import completion_logits, token_batch, token_logprobs
from forerun.types import Rollout

SLACK = 3.0
FLOOR = {torch.float32: 1e-9, torch.bfloat16: 1e-5}  # of KL, nats a token: for where the null is zero


@dataclass(frozen=True, slots=True)
class Gap:
    """Distance of two sets of log-probabilities of the same tokens."""

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


@dataclass(frozen=True, slots=True)
class Rounding:
    """What two correct computations may differ by."""

    batches: Gap  # of plain rows at two batch sizes
    error_kl: float  # of one computation to float32; 0 for float32
    dtype: torch.dtype

    @property
    def bound(self) -> float:
        """Allowed KL, nats a token."""
        return SLACK * max(self.batches.kl, 2 * self.error_kl) + FLOOR.get(self.dtype, 1e-5)


def parity_checks(policy: Policy, rollouts: Sequence[Rollout], k: int, slots: int, temperature: float) -> list[Check]:
    """Log-probabilities of speculative rollouts: replayed plainly, as verified rows, by the learner, as reported."""
    plain = replay(policy, rollouts, 1, slots, temperature)
    verified = replay(policy, rollouts, k + 1, slots, temperature)
    learner = learner_logprobs(policy, rollouts, temperature)
    sizes = (max(1, slots // 2), 2 * slots)[: 1 if len(rollouts) <= slots else 2]  # that change the batches
    batches = max(
        (gap(plain, replay(policy, rollouts, 1, size, temperature)) for size in sizes), key=lambda gap: gap.kl
    )
    in_float32, error_kl = [], 0.0
    if policy.dtype != torch.float32:
        exact = float32_copy(policy)
        truth = learner_logprobs(exact, rollouts, temperature)
        error_kl = median(gap(truth, values).kl for values in (plain, verified, learner))
        seen = gap(truth, replay(exact, rollouts, k + 1, slots, temperature))
        in_float32.append(_parity("verified rows against the learner, float32", seen, FLOOR[torch.float32]))
    rounding = Rounding(batches, error_kl, policy.dtype)
    pairs = {
        "verified rows against plain rows": (plain, verified),
        "learner against plain rows": (plain, learner),
        "reported against verified rows": (verified, [np.array(r.logprobs) for r in rollouts]),
    }
    return [_parity(name, gap(*pair), rounding.bound, rounding) for name, pair in pairs.items()] + in_float32


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


def _parity(name: str, seen: Gap, bound: float, rounding: Rounding | None = None) -> Check:
    numbers, sentence = asdict(seen), f"{seen} nats"
    if rounding is not None:
        numbers |= {f"null_{field}": value for field, value in asdict(rounding.batches).items()}
        numbers["rounding_kl"] = rounding.error_kl
        sentence += f"; plain at another batch size: {rounding.batches}; to float32: KL {rounding.error_kl:.2g}"
    return Check(name, seen.kl <= bound, f"{sentence}; allowed KL {bound:.2g}", numbers | {"bound_kl": bound})


def greedy_check(
    plain: RolloutEngine, speculative: RolloutEngine, policy: Policy, prompts: list[list[int]], tokens: int
) -> Check:
    """Greedy text of both engines; where they part, the margin of the policy's two likeliest tokens."""
    sampling = Sampling(tokens, 0.0, 0)
    ours, theirs = (sorted(e.stream(prompts, sampling), key=lambda r: r.prompt_index) for e in (speculative, plain))
    margins = [m for a, b in zip(ours, theirs, strict=True) if (m := parting_margin(policy, a, b)) is not None]
    noise = _plain_noise(policy, theirs) if margins else 0.0
    same = len(prompts) - len(margins)
    worst = max(margins, default=0.0)
    dtype = str(policy.dtype)[6:]
    sentence = f"{same} of {len(prompts)} texts identical over {tokens} tokens in {dtype}"
    if margins:
        sentence += f"; the others part at near-ties: margins up to {worst:.3g} nats, rounding explains {2 * noise:.3g}"
    numbers = {"identical": same, "prompts": len(prompts), "worst_margin": worst, "noise": noise}
    return Check(f"greedy text, {dtype}", worst <= 2 * noise, sentence, numbers)


def _plain_noise(policy: Policy, rollouts: Sequence[Rollout]) -> float:
    """Largest change of a log-probability of plainly decoded texts with the layout of its pass.

    A row at a time, in batches of eight and alone, against the whole text at once, as the learner reads it. The rows
    that a verification computes are not among them: a fault there would excuse itself.
    """
    whole = learner_logprobs(policy, rollouts, 1.0)
    return max(gap(whole, replay(policy, rollouts, 1, size, 1.0)).max for size in (8, 1))


def parting_margin(policy: Policy, one: Rollout, other: Rollout) -> float | None:
    """Log-probability between the policy's two likeliest tokens where two greedy texts part; None if they do not."""
    at = next((t for t, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
    if at is None:
        return None if len(one.tokens) == len(other.tokens) else float("inf")
    batch = token_batch([(one.prompt_ids + one.tokens[:at], [one.tokens[at]])], policy.device)
    with torch.no_grad():
        log_p = torch.log_softmax(completion_logits(policy.model, batch).float(), -1)[0]
    return float(log_p.max() - min(log_p[one.tokens[at]], log_p[other.tokens[at]]))
