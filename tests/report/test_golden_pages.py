"""Every page on recorded input against its recorded content: all figures, and the visible text.

`golden/*.json` hold input and content; of a run's page the text stops before the definitions of metrics. After a wanted
change: `python tests/report/test_golden_pages.py` writes the content anew; look at the difference before committing it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "helpers"))  # run as a program

from forerun.report.bench_page import write_bench
from forerun.report.plan_page import write_plan
from forerun.report.run_page import write_report
from forerun.report.verify_page import write_verification
from pages import Page

GOLDEN = Path(__file__).parent / "golden"
RECORDED = Path(__file__).parents[1] / "simulate"
NAMES = ("run", "bench", "plan", "plan_of_run", "verification")


def page_of(name: str, given: Any, folder: Path) -> Page:
    """The page `name` from its recorded input."""
    if name == "run":
        run = folder / "a-run"
        shutil.copytree(RECORDED / "recorded_run", run)
        return Page(write_report(run))
    if name == "bench":
        return Page(Path(write_bench(json.loads((RECORDED / "recorded_bench.json").read_text()), folder)["page"]))
    if name == "verification":
        return Page(Path(write_verification(given, folder)["page"]))
    return Page(write_plan(given, folder / "plan.html"))


def content_of(name: str, given: Any, folder: Path) -> dict[str, Any]:
    """What must not change unnoticed."""
    page = page_of(name, given, folder)
    return {"text": page.words.partition(" Metrics metric ")[0], "figures": page.figures()}


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_text_and_figures_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    recorded = golden(name)
    made = content_of(name, recorded.get("input"), tmp_path)
    assert made["text"] == recorded["text"]
    assert made["figures"] == recorded["figures"]


if __name__ == "__main__":
    for page_name in NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            record = golden(page_name)
            record |= content_of(page_name, record.get("input"), Path(scratch))
            (GOLDEN / f"{page_name}.json").write_text(json.dumps(record, separators=(",", ":")), encoding="utf-8")
