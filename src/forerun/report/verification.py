"""The page and the JSON of `forerun verify`: every claim, what was seen, and what the sample would have caught.

Left out: the tests themselves (`lossless/`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forerun.report.page import page_html, table_html, text
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
    write_atomically(paths["page"], page_html(f"{verdict['recipe']}: is it lossless?", _body(verdict)))
    return {name: str(path) for name, path in paths.items()}


def _body(verdict: Mapping[str, Any]) -> str:
    facts = ("engine", "policy", "dtype", "speculation", "temperature", "machine")
    parts = [
        f"<h1>{text(verdict['recipe'])}: is it lossless?</h1>",
        f'<p class="muted">{text(", ".join(f"{name} {verdict[name]}" for name in facts))}</p>',
        f'<p class="verdict">{text(_verdict(verdict))}</p>',
        table_html(["Claim", "Kind", "Verdict", "Seconds"], [_row(claim) for claim in verdict["claims"]], [3]),
    ]
    if verdict["injected_fault"]:
        parts.insert(2, f'<p class="notice warning"><b>Injected fault:</b> {text(verdict["injected_fault"])}</p>')
    return "\n".join(parts + [_section(claim) for claim in verdict["claims"]])


def _verdict(verdict: Mapping[str, Any]) -> str:
    if verdict["passed"]:
        return "Every claim holds: these rollouts are samples of the policy."
    return f"Not lossless. Failed: {', '.join(verdict['failed_claims'])}."


def _row(claim: Mapping[str, Any]) -> list[str]:
    return [claim["name"], claim["kind"], "holds" if claim["passed"] else "FAILED", f"{claim['seconds']:.0f}"]


def _section(claim: Mapping[str, Any]) -> str:
    rows = [
        [
            check["name"],
            "holds" if check["passed"] else "FAILED",
            "" if check["p_value"] is None else f"{check['p_value']:.3g}",
            check["sentence"],
            check["detectable"] or "",
        ]
        for check in claim["checks"]
    ]
    head = ["Check", "Verdict", "p", "Seen", "Would have caught, nine times in ten"]
    return f"<h2>{text(claim['name'])}</h2>\n<p>{text(KINDS[claim['kind']])}</p>\n{table_html(head, rows)}"
