"""The alarm for stale drafters: none in a thousand steps of noise, found when acceptance collapses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forerun.config import SpeculationConfig
from forerun.drafters.ngram import NgramDrafter
from forerun.engine.counters import Counters
from forerun.engine.local.engine import LocalEngine
from forerun.engine.staleness import ROUNDS, StaleDrafterDetector
from forerun.models import load_policy
from forerun.training.weights import pack_weights


def first_rounds(rates: np.ndarray, k: int, source: np.random.Generator) -> Counters:
    """Rounds of chains with one acceptance rate per round, at every position."""
    kept = np.cumprod(source.random((len(rates), k)) < rates[:, None], axis=1)
    accepted = int(kept.sum())
    n = len(rates)
    return Counters(n + accepted, n, n, n + accepted, n * k, kept.sum(axis=0).tolist(), [n] * k)


def warnings(windows: list[Counters], k: int) -> list[int]:
    """The loads after which the detector warns."""
    counters = Counters(accepted_at=[0] * k, drafted_at=[0] * k)
    detector, raised = StaleDrafterDetector(counters.copy()), []
    for load, window in enumerate(windows):
        detector.restart(counters)
        counters = counters.plus(window)
        if detector.look(counters) is not None:
            raised.append(load)
    return raised


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_a_thousand_loads_of_noise_raise_no_alarm(rate: float, k: int) -> None:
    """By design: at most `CHANCE` = 1e-5 per load, so 1 % that a thousand loads raise one; it is less, see `LOADS`."""
    source = np.random.default_rng(1)
    windows = [first_rounds(np.full(ROUNDS, rate), k, source) for _ in range(1000)]
    assert warnings(windows, k) == []


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.6])
def test_prompts_of_which_some_are_harder_raise_no_alarm(rate: float) -> None:
    """64 rounds of four prompts, whose rates differ: Beta with a standard deviation of up to 0.15."""
    source = np.random.default_rng(2)
    windows = [
        first_rounds(np.repeat(source.beta(rate * 10, (1 - rate) * 10, 4), ROUNDS // 4), 1, source) for _ in range(1000)
    ]
    assert warnings(windows, 1) == []


@pytest.mark.parametrize(
    ("before", "after", "k", "power"), [(0.6, 0.1, 1, 0.8), (0.6, 0.1, 3, 0.97), (0.8, 0.2, 3, 0.97)]
)
def test_a_collapse_is_found_at_once(before: float, after: float, k: int, power: float) -> None:
    """The share of 200 collapses that is found in the first 64 rounds, after five good loads."""
    source = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        windows = [first_rounds(np.full(ROUNDS, rate), k, source) for rate in [before] * 5 + [after] * 3]
        raised = warnings(windows, k)
        found += raised == [5]  # once: later loads are no worse
        assert raised in ([5], []) or raised[0] > 5
    assert found / 200 >= power


def test_a_drafter_without_weights_is_never_suspected(tiny: Callable[..., Path]) -> None:
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    block = SpeculationConfig.model_validate({"method": "ngram", "k": 3, "ngram": {"prompt_lookup_min": 1}})
    drafter = NgramDrafter(block.ngram)
    engine = LocalEngine(policy, drafter, k=3, slots=8)
    for version, prompt in enumerate([[5, 6, 7, 5, 6, 7] * 8, list(range(2, 50))]):  # easy to draft, then hard
        engine.load(pack_weights(version, policy, drafter))
        engine.generate([prompt], max_new_tokens=60, n=8)
    assert not engine.warnings and not engine._detector.known
