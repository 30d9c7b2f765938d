"""The page and the JSON of `forerun verify`: every claim, what was seen, and what the sample would have caught."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forerun.report.page import write_page
from forerun.tracking.files import write_atomically

KINDS = {
    "algorithmic": "The emitted text is distributed as the policy's own.",
    "numerical": "Rounding moves it no more than another batch size moves plain decoding.",
    "log-probability": "What is reported with a token is the policy's log-probability, as the learner computes it.",
    "contract": "The engine holds the versions it says, and a bad drafter is noticed.",
}


def write_verification(verdict: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write `verification.json` and `verification.html` into `folder`; returns their paths.

    Args:
        verdict: `lossless.Verification.to_dict()`.

    Raises:
        UserError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"json": folder / "verification.json", "page": folder / "verification.html"}
    write_atomically(paths["json"], json.dumps(verdict, indent=2, default=str) + "\n")
    title = f"{verdict['recipe']}: is it lossless?"
    write_page(paths["page"], "verification", title, {"verdict": verdict, "kinds": KINDS})
    return {name: str(path) for name, path in paths.items()}
