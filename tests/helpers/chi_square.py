"""Chi-square tests of counts against exact probabilities, their level and their power."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.stats import chi2
from torch import Tensor

from forerun.lossless.statistics import chi_square_tail, pooled_chi_square

LEVEL = 1e-7  # a correct rule fails less than once in ten million runs of one test
Text = tuple[int, ...]


def p_value(observed: Tensor, probabilities: Tensor, least: float = 10.0) -> float:
    """Probability of counts [n] at least this far from probabilities [n]; 0 when something impossible occurred."""
    counts, shares = observed.double().numpy(), probabilities.double().numpy()
    return chi_square_tail(*pooled_chi_square(counts, shares * counts.sum(), least))


def p_value_of_texts(counts: Counter[Text], law: dict[Text, float]) -> float:
    """The same of texts; cells that expect fewer than 8 are pooled."""
    assert set(counts) <= set(law), "a text of probability zero was sampled"
    observed = np.array([counts[text] for text in law], dtype=float)
    return chi_square_tail(*pooled_chi_square(observed, np.array([*law.values()]) * counts.total(), least=8.0))


def sigmas_of_detection(draws: int, cells: int, noncentrality_per_draw: float) -> float:
    """By how many standard deviations the mean statistic of a wrong law lies above the critical value at LEVEL.

    `noncentrality_per_draw` is sum (wrong - right)^2 / right, at least 4 TV^2 for a law that is TV away.
    """
    shift = draws * noncentrality_per_draw
    mean, deviation = cells - 1 + shift, (2 * (cells - 1 + 2 * shift)) ** 0.5
    return (mean - float(chi2.isf(LEVEL, cells - 1))) / deviation
