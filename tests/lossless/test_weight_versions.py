"""The claim of weight versions, for drafters that have no weights: a wrong checksum of nothing is refused, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from forerun.config import SpeculationConfig
from forerun.drafters import load_drafter
from forerun.engine.local.engine import LocalEngine
from forerun.lossless.weights import weight_checks
from forerun.models import load_policy
from forerun.training.weights import pack_weights


@pytest.mark.parametrize("method", ["ngram", "trie"])
def test_a_drafter_without_weights_passes_and_a_forged_checksum_is_refused(
    tiny: Callable[..., Path], method: str
) -> None:
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    block = SpeculationConfig.model_validate({"method": method, "k": 3})
    drafter = load_drafter(policy, block)
    assert drafter is not None and not drafter.state_dict()
    engine = LocalEngine(policy, drafter, k=3, slots=8)
    checks = weight_checks(engine, drafter, lambda version: pack_weights(version, policy, drafter), [[5, 6, 7]])
    assert [check.name for check in checks if not check.passed] == []
    assert "draft weights of version 3 have checksum" in next(c.sentence for c in checks if c.name == "stale drafter")
