"""The tests behind `forerun verify` against closed forms and earlier values of the same quantities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from forerun.lossless import statistics
from forerun.lossless.statistics import chi_square_tail, detectable_distance, normal_tail, pooled_chi_square


def tail_in_closed_form(statistic: float, freedom: int) -> float:
    """Abramowitz and Stegun 26.4.4 and 26.4.5: a finite sum, with erfc where `freedom` is odd."""
    half = statistic / 2
    start = 0.5 if freedom % 2 else 0.0
    terms = [math.exp((i + start) * math.log(half) - math.lgamma(i + start + 1)) for i in range(freedom // 2)]
    return (math.erfc(math.sqrt(half)) if freedom % 2 else 0.0) + math.exp(-half) * math.fsum(terms)


@pytest.mark.parametrize(
    ("statistic", "freedom", "before"),
    [
        (28.833376884470123, 27, 0.3690250124546831),
        (6.706244349990432, 9, 0.6676731129075033),
        (300.0, 40, 1.4955969722726186e-41),
        (1.0, 1, 0.3173105078629141),
        (900.0, 100, 6.929916559119848e-129),
    ],
)
def test_the_chi_square_tail_is_exact_to_twelve_digits(statistic: float, freedom: int, before: float) -> None:
    """`before`: torch.special.gammaincc, which was used earlier."""
    assert chi_square_tail(statistic, freedom) == pytest.approx(tail_in_closed_form(statistic, freedom), rel=1e-12)
    assert chi_square_tail(statistic, freedom) == pytest.approx(before, rel=1e-12)


def test_near_the_mean_of_many_degrees_torch_had_nine_digits() -> None:
    for statistic, freedom, before in ((62.625, 63, 0.4896321271666844), (62.625, 64, 0.5252522535796593)):
        exact = tail_in_closed_form(statistic, freedom)
        assert chi_square_tail(statistic, freedom) == pytest.approx(exact, rel=1e-12)
        assert before == pytest.approx(exact, rel=1e-9) and before != pytest.approx(exact, rel=1e-10)


def test_the_normal_tail_is_exact_to_twelve_digits() -> None:
    for z in (0.0, -0.6948913996548578, 3.0, 8.0, 12.0):
        assert normal_tail(z) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=1e-12)


def test_rare_cells_are_pooled_and_impossible_counts_are_infinite() -> None:
    expected = np.array([50.0, 30.0, 4.0, 3.0, 0.0])
    observed = np.array([44.0, 33.0, 6.0, 4.0, 0.0])
    statistic, freedom = pooled_chi_square(observed, expected)
    assert freedom == 2 and statistic == pytest.approx(36 / 50 + 9 / 30 + 9 / 7)
    assert pooled_chi_square(observed, expected, least=8.0) == pytest.approx((36 / 50 + 36 / 37, 1))
    assert pooled_chi_square(observed + np.array([0, 0, 0, 0, 1.0]), expected) == (math.inf, 1)
    assert pooled_chi_square(np.array([3.0]), np.array([3.0])) == (0.0, 0)


def test_the_detectable_distance_is_detected_nine_times_in_ten() -> None:
    source = np.random.default_rng(0)
    cells, draws, trials = 10, 4000, 2000
    distance = detectable_distance(draws, cells - 1)
    wrong = np.full(cells, 1 / cells) + np.where(np.arange(cells) % 2, 1, -1) * 2 * distance / cells
    statistics_seen = ((source.multinomial(draws, wrong, trials) - draws / cells) ** 2 / (draws / cells)).sum(1)
    found = np.mean([chi_square_tail(x, cells - 1) < statistics.LEVEL for x in statistics_seen])
    assert found == pytest.approx(statistics.POWER, abs=0.03)


@pytest.mark.parametrize("freedom", [1, 9, 300, 5000, 50_000])
def test_a_detectable_distance_exists_at_any_degrees(freedom: int) -> None:
    """Against the normal approximation of the noncentral chi-square: mean f + n, variance 2 (f + 2 n)."""
    n = (2 * detectable_distance(1, freedom)) ** 2
    critical = freedom + n - 1.2816 * math.sqrt(2 * (freedom + 2 * n))
    assert statistics.LEVEL / 2 < chi_square_tail(critical, freedom) < 2 * statistics.LEVEL


def test_nothing_is_detectable_without_cells() -> None:
    assert math.isnan(detectable_distance(100, 0))
