"""`forerun doctor`: what is there is found, and every gap has the command that closes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from forerun.doctor import EXTRAS, VLLM_ON_CPU, Extra, cuda_finding, findings_table, fits, found, free_memory, wanted
from forerun.report.tables import as_text

ABSENT = Extra("x", "nothing", "pip install 'forerun[x]'", ("no-such-distribution",))


@pytest.fixture
def findings() -> dict[str, Any]:
    return {
        "environment": {"python": "3.11.2", "versions": {"forerun": "0.1.0", "torch": "2.13.0"}},
        "device": "cpu",
        "cuda": cuda_finding(None, None, False),
        "free": {"ram_gib": 1.5, "disk_gib": 100.0, "gpus_gib": [70.25, 3.0]},
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
        "versions": "ok",
        "device": "ok",
        "cuda": "ok",
        "bfloat16": "gap",
        "memory": "gap",
        "disk": "ok",
        "gpu": "ok",
        "no_such_module": "gap",
        "numpy": "ok",
        "a-head": "ok",
        "another": "gap",
    }
    assert " ".join(lines["no_such_module"]).endswith("pip install 'forerun[x]' nothing")
    assert " ".join(lines["memory"]) == "gap memory 1.5 GiB free; end other programs: the quickstart takes 6.2"
    assert all(extra.mend.startswith("pip install") for extra in EXTRAS.values())


def test_the_commands_are_those_of_the_pages() -> None:
    root = Path(__file__).parents[1]
    assert VLLM_ON_CPU.mend.split(" (")[0] in (root / "docs" / "vllm.md").read_text()
    assert EXTRAS["ray"].mend in (root / "docs" / "scaling.md").read_text()
    assert re.search(r"^\.venv-vllm/ready:", (root / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("driver", "built_for", "available", "ok", "words"),
    [
        ("NVIDIA H100", "12.8", True, True, "CUDA 12.8"),
        (None, None, False, True, "no GPU"),
        ("NVIDIA H100", None, False, False, "CPU build: pip install --force-reinstall torch"),
        ("NVIDIA H100", "13.0", False, False, "does not run torch's CUDA 13.0: update"),
    ],
)
def test_what_stands_between_a_gpu_and_torch_is_said(
    driver: str | None, built_for: str | None, available: bool, ok: bool, words: str
) -> None:
    finding = cuda_finding(driver, built_for, available)
    assert finding["ok"] == ok and words in finding["note"]


def test_a_version_that_is_too_old_is_a_gap() -> None:
    assert wanted("vllm") == ">=0.32" and not fits("vllm", "0.11.2") and fits("vllm", "0.33.0rc1")
    assert fits("no-such-distribution", "1.0")


def test_free_memory_is_found() -> None:
    free = free_memory()
    assert free["disk_gib"] > 0 and (free["ram_gib"] is None or 0 < free["ram_gib"] < 10_000)
