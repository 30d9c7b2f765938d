"""Small trained things that ship with the package: each a folder, listed with checksums and numbers in manifest.json.

They are made by `scripts/make_artifacts.py`, from the recipes alone. A recipe loads one by its folder's name.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

FOLDER = Path(str(resources.files("forerun.artifacts")))


def shipped() -> dict[str, Any]:
    """name -> {"files": {file: sha256}, "made_by": command, ...}"""
    manifest = FOLDER / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}


def verify_artifact(name: str) -> str | None:
    """None when every file of an artifact has its checksum, else a sentence."""
    for file, expected in shipped()[name]["files"].items():
        path = FOLDER / name / file
        if not path.exists():
            return f"{file} is missing; reinstall forerun"
        if sha256(path) != expected:
            return f"{file} is damaged (its checksum differs); reinstall forerun"
    return None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
