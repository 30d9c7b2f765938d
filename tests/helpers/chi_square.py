"""A chi-square test of counts against exact probabilities, its level and its power."""

from __future__ import annotations

import torch
from torch import Tensor

LEVEL = 1e-7  # a correct rule fails less than once in ten million runs of one test
_LEAST_EXPECTED = 10.0  # cells that expect fewer are pooled, as the statistic asks


def pooled(observed: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and probabilities with the rare cells added up into one; a count where p is 0 is kept apart."""
    rare = probabilities * observed.sum() < _LEAST_EXPECTED
    return (
        torch.cat([observed[~rare], observed[rare].sum()[None]]),
        torch.cat([probabilities[~rare], probabilities[rare].sum()[None]]),
    )


def p_value(observed: Tensor, probabilities: Tensor) -> float:
    """Chance of counts [n] at least this far from probabilities [n]; 0 when something impossible was seen."""
    observed, probabilities = observed.double(), probabilities.double()
    if bool((observed[probabilities == 0] > 0).any()):
        return 0.0
    counts, shares = pooled(observed, probabilities)
    seen = shares > 0
    expected = shares[seen] * counts.sum()
    statistic = ((counts[seen] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def critical_value(cells: int) -> float:
    """The statistic whose p-value is LEVEL, by bisection."""
    low, high = 0.0, 100.0 * (cells + 10)
    freedom = torch.tensor((cells - 1) / 2, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        tail = float(torch.special.gammaincc(freedom, torch.tensor(middle / 2, dtype=torch.float64)))
        low, high = (middle, high) if tail > LEVEL else (low, middle)
    return high


def sigmas_of_detection(draws: int, cells: int, noncentrality_per_draw: float) -> float:
    """By how many standard deviations the mean statistic of a wrong law lies above the critical value.

    `noncentrality_per_draw` is sum (wrong - right)^2 / right, at least 4 TV^2 for a law that is TV away.
    """
    shift = draws * noncentrality_per_draw
    mean, deviation = cells - 1 + shift, (2 * (cells - 1 + 2 * shift)) ** 0.5
    return (mean - critical_value(cells)) / deviation
