"""Claim: whole rollouts of the plain and of the speculative engine come from one distribution.

Permutation tests: the labels "plain" and "speculative" are permuted among the rollouts of each prompt. They are exact,
whatever the dependence between the tokens of a rollout, and need no probabilities of the policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from forerun.lossless.statistics import LEVEL, detectable_shift, permutation_p, tail_share
from forerun.lossless.verdict import Check
from forerun.types import Rollout

PERMUTATIONS = 20_000
BIGRAMS = 256  # most frequent ones of both engines together


def two_sample_checks(
    plain: Sequence[Rollout], speculative: Sequence[Rollout], rewards: Sequence[float], seed: int
) -> list[Check]:
    """Lengths, bigrams and rewards of two sets of rollouts of the same prompts.

    Args:
        rewards: of the plain rollouts, then of the speculative ones.
    """
    rollouts = [*plain, *speculative]
    groups = np.array([r.prompt_index for r in rollouts])
    labels = np.arange(len(rollouts)) >= len(plain)
    lengths = np.array([[len(r.tokens)] for r in rollouts], dtype=float)
    return [
        _mean("lengths", "tokens", lengths, groups, labels, seed),
        _bigrams(rollouts, groups, labels, seed),
        _mean("rewards", "of reward", np.array(rewards, dtype=float)[:, None], groups, labels, seed),
    ]


def _mean(name: str, unit: str, values: np.ndarray, groups: np.ndarray, labels: np.ndarray, seed: int) -> Check:
    difference, null, deviation = permutation_p(values, groups, labels, PERMUTATIONS, seed)
    p_value = tail_share(abs(difference[0]), np.abs(null[:, 0]))
    plain, speculative = values[~labels].mean(), values[labels].mean()
    return Check(
        name,
        p_value > LEVEL,
        f"plain {plain:.3f}, speculative {speculative:.3f} {unit} on {(~labels).sum()} and {labels.sum()} rollouts, "
        f"p = {p_value:.3g}",
        {"plain": float(plain), "speculative": float(speculative), "stderr": float(deviation[0])},
        p_value,
        f"a shift of {detectable_shift(float(deviation[0])):.3f} {unit}",
    )


def _bigrams(rollouts: Sequence[Rollout], groups: np.ndarray, labels: np.ndarray, seed: int) -> Check:
    """Sum over bigrams of squared difference of mean counts over their deviation under relabeling."""
    counted = [Counter(pairwise(r.tokens)) for r in rollouts]
    frequent = [pair for pair, _ in sum(counted, Counter()).most_common(BIGRAMS)]
    counts = np.array([[c[pair] for pair in frequent] for c in counted], dtype=float)
    difference, null, deviation = permutation_p(counts, groups, labels, PERMUTATIONS, seed)
    weight = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    statistic, spread = float(((difference * weight) ** 2).sum()), ((null * weight) ** 2).sum(axis=1)
    p_value = tail_share(statistic, spread)
    worst = float(np.abs(difference * weight).max())
    return Check(
        "bigrams",
        p_value > LEVEL,
        f"{len(frequent)} bigrams, statistic {statistic:.0f} against {spread.mean():.0f} ± {spread.std():.0f} under "
        f"relabeling, farthest one {worst:.1f} deviations, p = {p_value:.3g}",
        {"statistic": statistic, "null_mean": float(spread.mean()), "bigrams": len(frequent)},
        p_value,
        f"one bigram in {detectable_shift(float(np.median(deviation))):.2f} more places a rollout",
    )
