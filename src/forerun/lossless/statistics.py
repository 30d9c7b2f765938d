"""Tests of hypotheses and their power. numpy only.

LEVEL is the chance that one check fails on a correct engine; a verification has about a dozen checks.
Left out: what is tested.
"""

from __future__ import annotations

import math

import numpy as np

LEVEL = 1e-4
POWER = 0.9
_LEAST_EXPECTED = 5.0  # cells that expect fewer are pooled, as the chi-square approximation asks
_Z_LEVEL, _Z_POWER = 3.8906, 1.2816  # two-sided LEVEL; one-sided POWER

Array = np.ndarray


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Chance that a chi-square variable of that many degrees of freedom exceeds `statistic`; 1 for none."""
    import torch

    if freedom < 1:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def normal_tail(z: float) -> float:
    """Two-sided tail of the standard normal."""
    return math.erfc(abs(z) / math.sqrt(2))


def pooled_chi_square(observed: Array, expected: Array) -> tuple[float, int]:
    """Statistic and degrees of freedom of counts [n] against expectations [n]; rare cells are added up into one.

    A count where nothing may be expected makes the statistic infinite.
    """
    if np.any(observed[expected <= 0] > 0):
        return math.inf, 1
    rare = expected < _LEAST_EXPECTED
    seen = np.append(observed[~rare], observed[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if 0 < wanted[-1] < _LEAST_EXPECTED and len(wanted) > 1:  # too little even together: into its neighbour
        seen, wanted = np.append(seen[:-2], seen[-2:].sum()), np.append(wanted[:-2], wanted[-2:].sum())
    kept = wanted > 0
    if kept.sum() < 2:
        return 0.0, 0
    return float(((seen[kept] - wanted[kept]) ** 2 / wanted[kept]).sum()), int(kept.sum()) - 1


def detectable_distance(draws: int, freedom: int) -> float:
    """Total variation that a chi-square test of `draws` draws finds with chance POWER at LEVEL.

    For a law whose fault is spread over the cells, noncentrality = draws (2 TV)^2; normal approximation of the
    noncentral chi-square: mean f + n, variance 2 (f + 2 n).
    """
    critical = _bisect(lambda x: chi_square_tail(x, freedom) - LEVEL, 0.0, 20.0 * (freedom + 20))

    def shortfall(n: float) -> float:
        return critical - (freedom + n) + _Z_POWER * math.sqrt(2 * (freedom + 2 * n))

    return math.sqrt(_bisect(shortfall, 0.0, 40.0 * (freedom + 20)) / draws) / 2


def detectable_shift(deviation: float) -> float:
    """Shift of a mean that a two-sided test finds with chance POWER at LEVEL, given its standard error."""
    return (_Z_LEVEL + _Z_POWER) * deviation


def permutation_p(values: Array, groups: Array, labels: Array, rounds: int, seed: int) -> tuple[Array, Array, Array]:
    """Two-sample comparison of mean vectors, exact under exchangeability within groups.

    Args:
        values: [S, M], one row per sequence. groups: [S] int, the prompt of each. labels: [S] bool, which engine.

    Returns:
        difference of the two means [M]; differences under `rounds` relabelings [rounds, M]; their deviation [M].
    """
    source = np.random.default_rng(seed)
    signs = np.where(labels, 1.0 / labels.sum(), -1.0 / (~labels).sum())
    shuffled = np.empty((rounds, len(signs)))
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    for part in members:
        order = source.random((rounds, len(part))).argsort(axis=1)
        shuffled[:, part] = signs[part][order]
    null = shuffled @ values
    return signs @ values, null, null.std(axis=0)


def tail_share(statistic: float, null: Array) -> float:
    """p-value of a permutation test: share of relabelings at least as extreme, the seen one among them."""
    return float((1 + (null >= statistic - 1e-12).sum()) / (1 + len(null)))


def _bisect(decreasing, low: float, high: float) -> float:  # type: ignore[no-untyped-def]
    """Root of a decreasing function by bisection."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return high
