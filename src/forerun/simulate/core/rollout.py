"""A batch of rollouts on replicas that drain: seconds until the last sequence ends.

Lengths in output tokens, times in seconds. Between two endings on a replica its batch is constant and every running
sequence advances by α tokens per round. Requests beyond the slots or the cache wait in order; the prompts of a group
share their prefill. Not modelled: preemption, migration between replicas, variance of acceptance within a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.decode import EngineCosts

Floats = NDArray[np.float64]
Pace = Callable[[Floats, Floats], Floats]  # batch and context to seconds per token of each running sequence


def sample_lengths(mean_tokens: float, sigma: float, cap_tokens: int, count: int, seed: int = 0) -> Floats:
    """`count` lognormal lengths from 1 to the cap; the mean is before the cut. Raises UserError for bad values."""
    if mean_tokens <= 0 or cap_tokens < 1 or sigma < 0:
        raise UserError(
            f"Output lengths of mean {mean_tokens}, spread {sigma} and cap {cap_tokens} cannot be; "
            "mean and cap must be positive and the spread not negative."
        )
    normal = np.random.default_rng(seed).standard_normal(count)
    return np.clip(np.rint(mean_tokens * np.exp(sigma * normal - sigma**2 / 2)), 1, cap_tokens)


def lengths_with_mean(mean_tokens: float, sigma: float, cap_tokens: int, count: int) -> Floats:
    """`count` lognormal lengths whose mean after the cut at the cap is `mean_tokens`, up to rounding."""
    goal = low = min(mean_tokens, float(cap_tokens))
    high = 1e3 * cap_tokens
    for _ in range(40):
        middle = (low * high) ** 0.5
        short = sample_lengths(middle, sigma, cap_tokens, count).mean() < goal
        low, high = (middle, high) if short else (low, middle)
    return sample_lengths(high, sigma, cap_tokens, count)


def trace_lengths(tokens: Sequence[float]) -> Floats:
    """Lengths of a real run's rollouts. Raises UserError without lengths, or for one that is not positive."""
    lengths = np.asarray(tokens, dtype=float)
    if lengths.size == 0 or lengths.min() < 1:
        worst = "none" if lengths.size == 0 else f"{lengths.min():g}"
        raise UserError(f"A trace of output lengths needs positive numbers; its smallest is {worst}.")
    return lengths


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """Times of a simulated rollout."""

    seconds: float
    prefill_s: float  # of the slowest replica
    mean_batch: float  # running sequences per replica, weighted by time


def simulate_rollout(
    costs: EngineCosts,
    lengths: Floats,
    *,
    replicas: int,
    k: int = 0,
    alpha: float = 1.0,
    in_flight: float = 0.0,
    prompt_tokens: float = 128.0,
    group: int = 1,
    slots: int = 1024,
) -> RolloutResult:
    """Generate `lengths` on `replicas` equal replicas, in rounds of `k` drafts that yield `alpha` tokens each.

    Args:
        costs: the engine; `group` samples share one prompt and its prefill.
        in_flight: batches that overlap, the result is then per batch; 0: the batch drains.
        slots: the most sequences that a replica runs at once; its cache may allow fewer.

    Raises:
        UserError: fewer than one replica or slot, or a cache that cannot hold a single sequence.
    """
    if replicas < 1 or slots < 1:
        raise UserError(f"{replicas} replicas with {slots} slots cannot run anything; both must be 1 at least.")
    limit = _running_limit(costs, lengths, prompt_tokens, slots)
    prompt_s = float(costs.prompt_s(np.float64(prompt_tokens))) / group

    def pace(batch: Floats, context: Floats) -> Floats:
        return np.asarray(costs.round_s(batch, k, context)) / alpha

    if in_flight:
        return overlapping(pace, lengths, in_flight, replicas, limit, prompt_tokens, prompt_s)
    queue = _deal(lengths, replicas)
    if queue.shape[1] <= limit:
        clocks = drain_together(pace, queue, prompt_tokens, prompt_s)
    else:
        clocks = drain_by_events(pace, queue, limit, prompt_tokens, prompt_s)
    slowest = int(np.argmax(clocks.seconds))
    mean_batch = float(clocks.batch_seconds.sum() / max(clocks.seconds.sum(), 1e-12))
    return RolloutResult(float(clocks.seconds[slowest]), float(clocks.prefill_s[slowest]), mean_batch)


@dataclass(frozen=True, slots=True)
class Clocks:
    """Totals of each of R replicas."""

    seconds: Floats  # [R]
    prefill_s: Floats  # [R]
    batch_seconds: Floats  # [R], running sequences integrated over time


def drain_together(pace: Pace, queue: Floats, prompt_tokens: float, prompt_s: float) -> Clocks:
    """All requests [R, Q] start at once, so that every batch between two endings is known: one pass over [R, Q]."""
    ends = np.sort(queue, axis=1)
    begins = np.concatenate([np.zeros((len(queue), 1)), ends[:, :-1]], axis=1)
    batch = np.arange(queue.shape[1], 0, -1.0)[None, :] * np.ones_like(ends)
    seconds = (ends - begins) * pace(batch, prompt_tokens + (begins + ends) / 2)
    requests = (queue > 0).sum(1)
    prefill_s = requests * prompt_s
    return Clocks(seconds.sum(1) + prefill_s, prefill_s, (batch * seconds).sum(1) + requests * prefill_s)


def drain_by_events(pace: Pace, queue: Floats, limit: int, prompt_tokens: float, prompt_s: float) -> Clocks:
    """At most `limit` of a replica's requests [R, Q] run at once; the next in order enters as one ends."""
    clocks = Clocks(*(np.zeros(len(queue)) for _ in range(3)))
    left, done = queue, np.zeros_like(queue)  # tokens to emit and emitted; nothing left: finished, or no request
    prefilled = np.zeros_like(queue, dtype=bool)
    while (left > 0).any():
        waiting = left > 0
        running = waiting & (np.cumsum(waiting, axis=1) <= limit)
        batch = running.sum(1).astype(float)
        live, size = batch > 0, np.maximum(batch, 1.0)
        step = np.where(live, np.where(running, left, np.inf).min(1, initial=np.inf), 0.0)
        context = prompt_tokens + np.where(running, done, 0.0).sum(1) / size + step / 2
        prefill_s = (running & ~prefilled).sum(1) * prompt_s
        spent_s = np.where(live, step * pace(size, context) + prefill_s, 0.0)
        clocks.seconds[:] += spent_s
        clocks.prefill_s[:] += prefill_s
        clocks.batch_seconds[:] += batch * spent_s
        prefilled |= running
        left = np.where(running, left - step[:, None], left)
        done = np.where(running, done + step[:, None], done)
    return clocks


def _deal(lengths: Floats, replicas: int) -> Floats:
    """Deal lengths round robin onto replicas: [replicas, requests], zero where a replica has none."""
    rows = -(-len(lengths) // replicas)
    padded = np.zeros(rows * replicas)
    padded[: len(lengths)] = lengths
    return padded.reshape(rows, replicas).T.copy()


def _running_limit(costs: EngineCosts, lengths: Floats, prompt_tokens: float, slots: int) -> int:
    room, need = costs.room_tokens(), prompt_tokens + float(np.mean(lengths))
    if room < prompt_tokens + 1:
        raise UserError(
            f"The cache holds {room:.0f} tokens, but one prompt has {prompt_tokens:.0f}; use more GPUs per replica."
        )
    return max(1, int(min(slots, room / need)))


def overlapping(
    pace: Pace,
    lengths: Floats,
    in_flight: float,
    replicas: int,
    limit: int,
    prompt_tokens: float,
    prompt_s: float,
) -> RolloutResult:
    """Eq. 14: times per batch when `in_flight` batches overlap, so that one batch fills the tail of another.

    The running sequences per replica settle at C = in_flight (N/R) E[L] / max L (a batch may not take longer than
    `in_flight` intervals), or at the slots where those are fewer; T = N E[L] t(C) / (α R C).
    """
    mean, requests = float(np.mean(lengths)), len(lengths) / replicas
    batch = float(np.clip(in_flight * requests * mean / np.max(lengths), 1e-9, limit))
    context = prompt_tokens + float(np.mean(lengths**2)) / (2 * mean)
    token_s = float(pace(np.array(max(batch, 1.0)), np.array(context)))
    prefill_s = requests * prompt_s
    return RolloutResult(requests * mean * token_s / batch + prefill_s, prefill_s, batch)
