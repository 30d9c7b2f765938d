"""Fixtures that all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from forerun.models import Policy, load_policy
from forerun.workers import local
from fork_server import ForkServer
from tiny_models import save_tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a long file that starts last would leave the other processors idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(family, **config changes) -> folder; the same model every time."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **changes: Any) -> Path:
        key = f"{family}{sorted(changes.items())}"
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def policy(tiny: Callable[..., Path]) -> Policy:
    """A tiny float32 Llama."""
    return load_policy(str(tiny("llama")), "float32", "cpu")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """One per process that runs tests, from the first test on that needs it."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def forked_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Local workers of this module's tests are forked and not started as interpreters, which takes seconds each."""
    if sys.platform != "linux":
        yield
        return
    with request.getfixturevalue("fork_server").used():
        yield


@pytest.fixture
def real_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's workers are interpreters as users' are, whatever its module says."""
    monkeypatch.setattr(local, "subprocess", subprocess)
