"""Fixtures of the vLLM engine's tests, one engine for all of them: a start takes 5 to 25 seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.models import Policy, load_policy
from tiny_models import save_tiny
from vllm_tiny import SHAPE, frequent, head_for, make, version


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(str(save_tiny(tmp_path_factory.mktemp("vllm") / "policy", **SHAPE)), "float32", "cpu")


@pytest.fixture(scope="session")
def drafter(small: Policy) -> Eagle3Drafter:
    return head_for(small, frequent(small))


@pytest.fixture(scope="session")
def engine(small: Policy, drafter: Eagle3Drafter) -> Iterator[Any]:
    made = make(small, drafter, {"method": "eagle3", "draft": "given", "k": 3}, sleep=True)
    yield made
    made.close()


@pytest.fixture
def fresh(engine: Any, small: Policy, drafter: Eagle3Drafter) -> Any:
    """The engine with the first weights, whatever a test before it did."""
    engine.load(version(0, small, drafter))
    return engine
