"""Claim: short continuations have the joint distribution that the policy gives them.

Many continuations are sampled through the engine from contexts where a wrong rule would show most, and their exact
probabilities computed without a drafter. Four tests, each exact at any vocabulary size because tokens are grouped by
the policy's own probabilities:

- cells: among texts that share a prefix, how often the next token is in each cell, against the exact probabilities,
  summed over all frequent prefixes. A cell is a range of ranks under the policy, split into tokens that the drafter
  over- and underrates: the direction in which faults of acceptance rules act;
- lean: the same cells, observed minus expected summed over all prefixes first, for faults too small after one prefix;
- joint: u_t = (mass above) + v p, v uniform, is independent and uniform along a text whatever the context, so the
  triple (u_1, u_2, u_3) fills a 4 x 4 x 4 grid evenly (the Rosenblatt transform, 1952);
- sharpness: the sum of -log p - H is a martingale of known variance; a rule that prefers likely tokens shifts it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from forerun.drafters import Drafter
from forerun.engine import RolloutEngine, Sampling
from forerun.lossless.exact import Exact, exact_rows, next_rows
from forerun.lossless.statistics import (
    LEVEL,
    chi_square_tail,
    detectable_distance,
    detectable_shift,
    normal_tail,
    pooled_chi_square,
)
from forerun.lossless.verdict import Check
from forerun.models import Policy

GRID = 4  # cells per axis of the joint test
DEPTH = 3  # tokens of the joint test
OFTEN = 50  # texts that must share a prefix for a test of its own,
SHARED = 8  # and to be counted at all
RANKS = (1, 2, 3, 8)  # ends of the rank cells: likeliest, second, third, 4th to 8th, the rest


def distribution_checks(
    engine: RolloutEngine,
    policy: Policy,
    drafter: Drafter,
    contexts: list[list[int]],
    samples: int,
    length: int,
    sampling: Sampling,
) -> list[Check]:
    """Sample `samples` continuations of `length` tokens from each context and test them. `length` is at least 3.

    `drafter` is asked what it would propose after them; one that learns from what it sees must not be the engine's own.
    """
    exact, groups = [], []
    texts = _sample(engine, contexts, samples, length, sampling)
    for context, some in zip(contexts, texts, strict=True):
        unique, where = torch.unique(some, dim=0, return_inverse=True)
        rows = exact_rows(policy, context, unique, sampling.temperature)
        exact.append(Exact(*(getattr(rows, name)[where.numpy()] for name in Exact.__slots__)))
        groups += _next_tokens(policy, drafter, context, some, sampling.temperature)
    return [_cells(groups), _lean(groups), _joint(exact, sampling.seed), _sharpness(exact)]


def _sample(
    engine: RolloutEngine, contexts: list[list[int]], samples: int, length: int, sampling: Sampling
) -> list[torch.Tensor]:
    """[samples, length] token ids per context; the end token does not end a text."""
    short = Sampling(length, sampling.temperature, sampling.seed, ignore_eos=True)
    texts: list[list[list[int]]] = [[] for _ in contexts]
    for rollout in engine.stream(contexts, short, samples):
        texts[rollout.prompt_index].append(rollout.tokens)
    return [torch.tensor(rows) for rows in texts]


def _next_tokens(
    policy: Policy, drafter: Drafter, context: list[int], texts: torch.Tensor, temperature: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(observed, expected) counts of the next token's cell after every shared prefix."""
    shared = list(_shared_prefixes(texts.numpy()))
    prefixes = [texts[members[0], :depth].tolist() for depth, members in shared]
    log_p, q = next_rows(policy, drafter, context, prefixes, temperature)
    counts = []
    for (depth, members), row, drafted in zip(shared, log_p, q, strict=True):
        p = row.double().exp()
        rank = torch.empty_like(row, dtype=torch.int64)
        rank[row.argsort(descending=True, stable=True)] = torch.arange(len(row))
        cell = 2 * torch.bucketize(rank, torch.tensor(RANKS), right=True) + (drafted.double() > p)
        expected = torch.zeros(2 * len(RANKS) + 2, dtype=torch.float64).index_add(0, cell, p) * len(members)
        observed = torch.bincount(cell[texts[members, depth]], minlength=len(expected))
        counts.append((observed.double().numpy(), expected.numpy()))
    return counts


def _cells(groups: list[tuple[np.ndarray, np.ndarray]]) -> Check:
    """Chi-square of the cells, summed over prefixes."""
    groups = [(observed, expected) for observed, expected in groups if observed.sum() >= OFTEN]
    parts = [pooled_chi_square(observed, expected) for observed, expected in groups]
    statistic = sum(value for value, _ in parts)
    freedom = sum(degrees for _, degrees in parts)
    numbers = _counted(groups)
    sample = f"{numbers['draws']} tokens after {numbers['prefixes']} prefixes"
    return _chi_square_check("next token by rank and draft", sample, statistic, freedom, numbers)


def _counted(groups: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    return {"draws": int(sum(observed.sum() for observed, _ in groups)), "prefixes": len(groups)}


def _lean(groups: list[tuple[np.ndarray, np.ndarray]]) -> Check:
    """Observed minus expected by cell, summed over prefixes: a martingale with the multinomials' covariance.

    A fault with the same direction after every prefix adds up here, at few degrees of freedom.
    """
    difference = sum(observed - expected for observed, expected in groups)
    covariance = sum(np.diag(e) - np.outer(e, e) / e.sum() for _, e in groups)
    likely = np.diag(covariance) >= 5
    difference, covariance = difference[likely], covariance[np.ix_(likely, likely)]
    freedom = int(np.linalg.matrix_rank(covariance, tol=1e-6 * covariance.max(initial=1.0)))
    statistic = float(difference @ np.linalg.pinv(covariance, rcond=1e-6, hermitian=True) @ difference)
    numbers = _counted(groups)
    sample = f"{numbers['draws']} tokens after {numbers['prefixes']} prefixes, added up by rank and draft"
    return _chi_square_check("lean towards the draft", sample, statistic, freedom, numbers, ", the same way everywhere")


def _chi_square_check(
    name: str, sample: str, statistic: float, freedom: int, numbers: dict[str, float], where: str = ""
) -> Check:
    """A chi-square test of numbers["draws"] draws, with the distance that it could have detected."""
    p_value = chi_square_tail(statistic, freedom)
    distance = detectable_distance(int(numbers["draws"]), freedom)
    return Check(
        name,
        p_value > LEVEL and freedom > 0,
        f"{sample}, chi-square {statistic:.1f} at {freedom} degrees, p = {p_value:.3g}",
        {"chi_square": statistic, "freedom": freedom, **numbers},
        p_value,
        f"a distribution that is {distance:.1%} of total variation away{where}",
    )


def _shared_prefixes(texts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(depth, indices of the texts) for every prefix of at least SHARED texts, the empty one first."""
    for depth in range(texts.shape[1]):
        _, where, counts = np.unique(texts[:, :depth], axis=0, return_inverse=True, return_counts=True)
        for group in np.flatnonzero(counts >= SHARED):
            yield depth, np.flatnonzero(where.reshape(-1) == group)


def _joint(exact: list[Exact], seed: int) -> Check:
    """Chi-square of (u_1, u_2, u_3) on the grid."""
    above, p = (np.concatenate([getattr(rows, name)[:, :DEPTH] for rows in exact]) for name in ("above", "p"))
    u = above + np.random.default_rng(seed).random(p.shape) * p
    index = np.clip((u * GRID).astype(int), 0, GRID - 1) @ GRID ** np.arange(DEPTH)
    observed = np.bincount(index, minlength=GRID**DEPTH).astype(float)
    statistic, freedom = pooled_chi_square(observed, np.full(GRID**DEPTH, len(u) / GRID**DEPTH))
    sample = f"{len(u)} texts in {GRID**DEPTH} cells"
    return _chi_square_check(f"joint law of {DEPTH} tokens", sample, statistic, freedom, {"draws": len(u)})


def _sharpness(exact: list[Exact]) -> Check:
    """The martingale test."""
    total = sum(rows.surprise.sum() for rows in exact)
    deviation = sum(rows.variance.sum() for rows in exact) ** 0.5
    tokens = sum(rows.p.size for rows in exact)
    z = total / deviation if deviation > 0 else 0.0
    p_value = normal_tail(z)
    return Check(
        "sharpness",
        p_value > LEVEL,
        f"-log p exceeds the policy's entropy by {total / tokens:+.5f} nats a token over {tokens} tokens, z = {z:+.2f}",
        {"nats": total / tokens, "z": z, "tokens": tokens},
        p_value,
        f"a shift of {detectable_shift(deviation / tokens):.5f} nats a token",
    )
