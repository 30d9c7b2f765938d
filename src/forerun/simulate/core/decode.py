"""Seconds of a decode step and of a speculation round on a replica, and the tokens that a round yields.

Seconds per iteration of the whole replica; `k` draft tokens per sequence and round, 0: plain decoding; acceptance
length α counts the emitted tokens of a round, bonus included, 1 <= α <= k+1. Batch and context may be numpy arrays.
Not modelled: rejection sampling kernels (part of the fitted constants), draft caches in memory limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.operators import (
    WEIGHT_BYTES,
    Layout,
    Numbers,
    Replica,
    cache_tokens,
    forward_s,
    gemm_s,
    host_s,
    prefill_s,
)
from forerun.simulate.core.shapes import ModelShape

EAGLE3_VOCAB = 32_000  # draft vocabulary of the published EAGLE-3 heads
METHODS = ("eagle3", "eagle1", "mtp", "model", "ngram", "tree")
COSTS_AS = {"trie": "ngram", "graft": "tree"}  # drafters that cost what another one costs
TREE_WIDTH = 4
TREE_NODES = 16
FUSES_HIDDEN_STATES = ("eagle3", "tree")


@dataclass(frozen=True, slots=True)
class Drafter:
    """What a drafter costs. `shape` runs once per draft step; None: no forward pass, as for n-grams."""

    method: str
    shape: ModelShape | None = None
    width: int = 1  # rows per sequence and draft step (trees)
    nodes: int = 0  # verified nodes of a tree; 0: a chain of k


@dataclass(frozen=True, slots=True)
class RoundConstants:
    """What a round costs beyond the roofline of its passes; at most two of them are fitted per engine."""

    token_s: float = 0.3e-3  # per draft step: launches and host work
    fixed_s: float = 0.5e-3  # per round: rejection sampling, bookkeeping
    row_s: float = 0.0  # per draft token of every sequence: bookkeeping and log-probabilities of a verified row
    slow_row_s: float = 0.0  # instead of `row_s` beyond `fast_k` draft tokens, where rows leave captured graphs
    fast_k: int = 1_000
    scan_s: float = 3e-9  # n-gram lookup on the host, per sequence and token of context


IDEAL = RoundConstants(token_s=0.0, fixed_s=0.0, scan_s=0.0)  # rounds cost what the device needs


def make_drafter(method: str, model: ModelShape, draft: ModelShape | None = None, draft_vocab: int = 0) -> Drafter:
    """The drafter of a method of `METHODS` for a policy.

    Args:
        draft: the smaller model of `model`.
        draft_vocab: tokens that an EAGLE-3 head proposes; 0: as many as the published heads.

    Raises:
        UserError: another method, or `model` without a draft model.
    """
    if method not in METHODS:
        raise UserError(
            f"The simulator has no cost model for the drafter {method!r}; it has one for {', '.join(METHODS)}. Another "
            "drafter can be planned from measurements: --costs FILE, or a finished run."
        )
    if method == "ngram":
        return Drafter(method)
    if method == "model":
        if draft is None:
            raise UserError("Drafting with a small model needs that model; name it, for example draft=Qwen3-0.6B.")
        return Drafter(method, draft)
    layer = replace(model, name=f"{model.name} {method}", layers=1)
    if method == "mtp":
        experts = None if model.experts is None else replace(model.experts, dense_layers=0)
        return Drafter(method, replace(layer, experts=experts))
    dense = replace(layer, experts=None, latent=None, kv_heads=min(model.kv_heads, 8))
    if method == "eagle1":
        return Drafter(method, dense)
    head = replace(dense, vocab=draft_vocab or min(EAGLE3_VOCAB, model.vocab))
    return Drafter(method, head, TREE_WIDTH, TREE_NODES) if method == "tree" else Drafter(method, head)


@dataclass(frozen=True, slots=True)
class AnalyticalEngine:
    """An engine from its operators: a replica, a drafter on the same GPUs, and round constants."""

    replica: Replica
    drafter: Drafter = Drafter("ngram")
    rounds: RoundConstants = RoundConstants()

    def plain_s(self, batch: Numbers, context: Numbers) -> Numbers:
        """Eq. 10: device pass plus host."""
        return forward_s(self.replica, batch, 1.0, context) + host_s(self.replica, batch)

    def verify_s(self, batch: Numbers, k: Numbers, context: Numbers) -> Numbers:
        """Eq. 11: the policy's pass over k+1 rows (a tree: all nodes and the root), host included."""
        rows = np.asarray(k, dtype=float) + 1.0
        if self.drafter.nodes:
            rows = np.where(rows > 1.0, self.drafter.nodes + 1.0, 1.0)
        return forward_s(self.replica, batch, rows, context) + host_s(self.replica, batch)

    def draft_s(self, batch: Numbers, context: Numbers) -> Numbers:
        """Device seconds of one draft step for all sequences."""
        if self.drafter.shape is None:
            return 0.0 * batch
        expert = self.replica.layout.expert if self.drafter.shape.experts else 1
        layout = Layout(self.replica.layout.tensor, self.replica.layout.data, expert)
        own = replace(self.replica, model=self.drafter.shape, layout=layout)
        return forward_s(own, batch, float(self.drafter.width), context)

    def round_s(self, batch: Numbers, k: Numbers, context: Numbers) -> Numbers:
        """Eq. 12: verify + k (draft + token_s + batch row_s) + fixed_s; with k = 0 a plain step."""
        rounds, steps = self.rounds, np.asarray(k, dtype=float)
        row_s = np.where(steps > rounds.fast_k, rounds.slow_row_s, rounds.row_s)
        added_s = rounds.fixed_s + steps * (self.draft_s(batch, context) + batch * row_s)
        if self.drafter.shape is None:
            added_s = added_s + rounds.scan_s * batch * context
        else:
            added_s = added_s + steps * rounds.token_s + self._fusion_s(batch)
        return self.verify_s(batch, steps, context) + np.where(steps > 0, added_s, 0.0)

    def prompt_s(self, tokens: Numbers) -> Numbers:
        """Seconds that one prompt occupies the replica; copies of attention prefill in parallel."""
        return prefill_s(self.replica, tokens) / self.replica.layout.data

    def room_tokens(self) -> float:
        """Tokens of cache beside policy and drafter."""
        params = self.drafter.shape.params if self.drafter.shape else 0
        return cache_tokens(self.replica, params * WEIGHT_BYTES[self.replica.precision] * self.replica.layout.data)

    def _fusion_s(self, batch: Numbers) -> Numbers:
        """EAGLE-3 fuses three hidden states into one, once per round."""
        if self.drafter.method not in FUSES_HIDDEN_STATES:
            return 0.0 * batch
        hidden = self.replica.model.hidden
        return gemm_s(self.replica, batch, hidden / self.replica.layout.tensor, 3 * hidden)


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """What one generation computes."""

    passes: float
    batch: float  # mean sequences of a pass
    context: float  # mean tokens that a sequence has cached in a pass
    prompt_tokens: float


@dataclass(frozen=True, slots=True)
class LinearEngine:
    """An engine whose seconds are linear in batch B, context S and k.

    plain = step + sequence B + cached B S; round = plain + verify_fixed + row B k + draft_fixed k + draft_row B k.
    """

    step_s: float
    sequence_s: float
    cached_s: float  # per sequence and token of context
    verify_fixed_s: float
    row_s: float  # per sequence and draft token, verification
    draft_fixed_s: float  # per draft token
    draft_row_s: float  # per sequence and draft token
    prompt_token_s: float = 0.0
    capacity_tokens: float = float("inf")
    error: float = 0.0  # median relative error on the rows it was fitted to
    not_identified: tuple[str, ...] = ()

    def plain_s(self, batch: Numbers, context: Numbers) -> Numbers:
        """Seconds of one plain decode step."""
        return self.step_s + batch * (self.sequence_s + self.cached_s * context)

    def draft_s(self, batch: Numbers, context: Numbers) -> Numbers:
        """Seconds of one draft step for all sequences."""
        return self.draft_fixed_s + self.draft_row_s * batch

    def round_s(self, batch: Numbers, k: Numbers, context: Numbers) -> Numbers:
        """Seconds of one round; with k = 0 a plain step."""
        extra_s = np.where(np.asarray(k) > 0, self.verify_fixed_s, 0.0) + k * batch * self.row_s
        return self.plain_s(batch, context) + extra_s + k * self.draft_s(batch, context)

    def prompt_s(self, tokens: Numbers) -> Numbers:
        """Seconds that one prompt occupies the engine."""
        return tokens * self.prompt_token_s

    def room_tokens(self) -> float:
        """Tokens of cache."""
        return self.capacity_tokens

    def generation_s(self, work: DecodeWork, k: int) -> float:
        """Seconds of a whole generation, all of it plain or in rounds of k; costs are linear, so means suffice."""
        rounds_s = work.passes * float(self.round_s(work.batch, k, work.context))
        return rounds_s + work.prompt_tokens * self.prompt_token_s


EngineCosts = AnalyticalEngine | LinearEngine

ROUNDING = 1e-6  # of an acceptance length
NOISE = 0.05  # of a measured one


def acceptance_length(k: int, rate: float) -> float:
    """α = 1 + p + ... + p^k: one plus the expected accepted drafts at a constant conditional rate p."""
    return sum(rate**j for j in range(k + 1))


def rate_for(k: int, alpha: float) -> float:
    """The constant conditional rate p that gives α at k, by bisection. Raises UserError for α outside [1, k+1]."""
    if not 1.0 - ROUNDING <= alpha <= k + 1.0 + ROUNDING:
        raise UserError(f"An acceptance length of {alpha} with k = {k} cannot be; it lies between 1 and {k + 1}.")
    if alpha >= k + 1.0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if acceptance_length(k, middle) < alpha else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Conditional acceptance by position: `rates[j]` given that the j drafts before were accepted.

    The last rate holds for all later positions. α(k) = 1 + sum over positions of the cumulative product.
    """

    rates: tuple[float, ...]

    def length(self, k: Numbers) -> NDArray[np.float64]:
        """Acceptance length α for each k."""
        wanted = np.asarray(k, dtype=float)
        longest = int(np.max(wanted, initial=0))
        rates = (self.rates + self.rates[-1:] * longest)[:longest]
        table = 1.0 + np.concatenate([[0.0], np.cumsum(np.cumprod(rates))])
        return np.interp(wanted, np.arange(longest + 1), table)


def constant_acceptance(rate: float) -> Acceptance:
    """The same conditional rate at every position. Raises UserError for a rate outside [0, 1]."""
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"An acceptance rate of {rate} cannot be; it lies between 0 and 1.")
    return Acceptance((rate,))


def acceptance_from_lengths(lengths: Mapping[int, float]) -> Acceptance:
    """Conditional rates from measured acceptance lengths at some k; between two k the rate is constant.

    Noise is clipped: a length that falls with k, and one up to `NOISE` above what the drafts before allow.

    Raises:
        UserError: a length is outside [1, k+1], or grows by more than the chance that all drafts before were accepted.
    """
    rates: list[float] = []
    reached, alpha = 1.0, 1.0  # chance that all drafts so far were accepted, α so far
    for k in sorted(lengths):
        gap, gain = k - len(rates), max(lengths[k] - alpha, 0.0)
        most = gap * reached
        if not 1.0 <= lengths[k] <= k + 1.0 + ROUNDING or gain > most + NOISE:
            before = f", as it is {alpha:.6g} with k = {len(rates)}" if rates else ""
            raise UserError(
                f"An acceptance length of {lengths[k]} with k = {k} cannot be; it lies between 1 and "
                f"{alpha + most:.6g}{before}: a draft counts only where all before it were accepted."
            )
        gain = min(gain, most)
        rate = rate_for(gap, 1.0 + gain / reached) if gain > 0 else 0.0
        rates += [rate] * gap
        reached, alpha = reached * rate**gap, alpha + gain
    return Acceptance(tuple(rates))


def best_k_by_batch(
    costs: EngineCosts, acceptance: Acceptance, context: float, batches: Sequence[int], k_max: int
) -> list[tuple[float, int]]:
    """(largest batch, the k that yields most tokens per second), ascending; the last one is unbounded."""
    sizes = np.array(sorted(batches), dtype=float)
    ks = np.arange(k_max + 1, dtype=float)
    seconds = np.stack([costs.round_s(sizes, np.full_like(sizes, k), np.full_like(sizes, context)) for k in ks])
    best = np.argmax(acceptance.length(ks)[:, None] / seconds, axis=0)
    last = np.append(best[1:] != best[:-1], True)  # of the neighbours with the same k
    sizes[-1] = np.inf
    return [(float(size), int(k)) for size, k in zip(sizes[last], best[last], strict=True)]
