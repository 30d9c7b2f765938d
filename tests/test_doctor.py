"""`forerun doctor`: what is there is found, and every gap has the command that closes it."""

from __future__ import annotations

from typing import Any

import pytest

from forerun.doctor import EXTRAS, VLLM_ON_CPU, Extra, findings_table, found
from forerun.report.tables import as_text

ABSENT = Extra("x", "nothing", "pip install 'forerun[x]'", ("no-such-distribution",))


@pytest.fixture
def findings() -> dict[str, Any]:
    return {
        "device": "cpu",
        "native_bfloat16": False,
        "threads": 2,
        "extras": {"no_such_module": found("no_such_module", ABSENT), "numpy": found("numpy", _of("numpy"))},
        "artifacts": {"a-head": "checksum right", "another": "model.safetensors is missing; reinstall forerun"},
    }


def _of(name: str) -> Extra:
    return Extra("x", "numbers", f"pip install {name}", ("no-such-distribution", name))


def test_a_module_is_found_under_any_of_its_distributions(findings: dict[str, Any]) -> None:
    import numpy

    assert findings["extras"]["numpy"]["installed"] and findings["extras"]["numpy"]["version"] == numpy.__version__
    assert findings["extras"]["no_such_module"]["installed"] is False


def test_every_gap_has_its_command(findings: dict[str, Any]) -> None:
    lines = {line.split()[1]: line.split() for line in as_text(findings_table(findings)).splitlines()[2:]}
    assert {subject: words[0] for subject, words in lines.items()} == {
        "device": "ok",
        "bfloat16": "gap",
        "no_such_module": "gap",
        "numpy": "ok",
        "a-head": "ok",
        "another": "gap",
    }
    assert " ".join(lines["no_such_module"]).endswith("pip install 'forerun[x]' nothing")
    assert all(extra.mend.startswith("pip install") for extra in (*EXTRAS.values(), VLLM_ON_CPU))
