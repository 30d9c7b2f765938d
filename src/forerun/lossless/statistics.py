"""Statistical tests and their power.

LEVEL is the chance that one check fails on a correct engine; a verification has about a dozen checks. scipy is imported
where it is used: it would slow down the start of the command line.
"""

from __future__ import annotations

import math

import numpy as np

LEVEL = 1e-4
POWER = 0.9

Array = np.ndarray


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Probability that a chi-square variable of that many degrees of freedom exceeds `statistic`; 1 for none."""
    from scipy.stats import chi2

    return float(chi2.sf(statistic, freedom)) if freedom >= 1 else 1.0


def normal_tail(z: float) -> float:
    """Two-sided tail of the standard normal."""
    from scipy.stats import norm

    return float(2 * norm.sf(abs(z)))


def pooled_chi_square(observed: Array, expected: Array, least: float = 5.0) -> tuple[float, int]:
    """Statistic and degrees of freedom of counts [n] against expectations [n].

    Cells that expect fewer than `least` are pooled, as the chi-square approximation requires. A count where nothing may
    be expected makes the statistic infinite.
    """
    if np.any(observed[expected <= 0] > 0):
        return math.inf, 1
    rare = expected < least
    counts = np.append(observed[~rare], observed[rare].sum())
    means = np.append(expected[~rare], expected[rare].sum())
    if 0 < means[-1] < least and len(means) > 1:  # still too few: into the last cell
        counts = np.append(counts[:-2], counts[-2:].sum())
        means = np.append(means[:-2], means[-2:].sum())
    kept = means > 0
    if kept.sum() < 2:
        return 0.0, 0
    return float(((counts[kept] - means[kept]) ** 2 / means[kept]).sum()), int(kept.sum()) - 1


def detectable_distance(draws: int, freedom: int) -> float:
    """Total variation that a chi-square test of `draws` draws detects with probability POWER at LEVEL, or nan.

    For a difference that is spread over the cells the statistic is noncentral chi-square, noncentrality draws (2 TV)^2.
    """
    from scipy.optimize import brentq
    from scipy.stats import chi2, ncx2

    if freedom < 1:
        return math.nan
    critical = chi2.isf(LEVEL, freedom)
    noncentrality = brentq(lambda n: ncx2.sf(critical, freedom, n) - POWER, 0.0, 40.0 * (freedom + 20))
    return math.sqrt(noncentrality / draws) / 2


def detectable_shift(deviation: float) -> float:
    """Shift of a mean that a two-sided test detects with probability POWER at LEVEL, given its standard error."""
    from scipy.stats import norm

    return float(norm.isf(LEVEL / 2) + norm.ppf(POWER)) * deviation


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
    """p-value of a permutation test: share of relabelings at least as extreme, the observed one included."""
    return float((1 + (null >= statistic - 1e-12).sum()) / (1 + len(null)))
