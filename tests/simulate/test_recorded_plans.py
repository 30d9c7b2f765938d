"""Plans against recorded ones: a change of code that changes a predicted number fails here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from forerun.simulate.plan.planner import plan
from forerun.simulate.plan.run import plan_run

FOLDER = Path(__file__).parent
RECORDED = json.loads((FOLDER / "recorded_plans.json").read_text())


def differences(found: Any, recorded: Any, where: str = "") -> list[str]:
    """Where two pieces of plain data differ by more than a millionth."""
    if isinstance(recorded, dict):
        if not isinstance(found, dict) or found.keys() != recorded.keys():
            return [f"{where}: other keys"]
        return [line for key in recorded for line in differences(found[key], recorded[key], f"{where}/{key}")]
    if isinstance(recorded, list):
        if len(found) != len(recorded):
            return [f"{where}: {len(found)} entries, not {len(recorded)}"]
        pairs = enumerate(zip(found, recorded, strict=True))
        return [line for i, (ours, theirs) in pairs for line in differences(ours, theirs, f"{where}/{i}")]
    same = found == pytest.approx(recorded, rel=1e-6, abs=1e-9) if isinstance(recorded, float) else found == recorded
    return [] if same else [f"{where}: {found!r}, not {recorded!r}"]


@pytest.mark.parametrize("case", RECORDED["plans"], ids=lambda case: f"{case['spec']['model']}-{len(case['spec'])}")
def test_a_plan_gives_the_recorded_numbers(case: dict[str, Any]) -> None:
    found = json.loads(json.dumps(plan(case["spec"]).to_dict()))
    assert differences({name: found[name] for name in case["plan"]}, case["plan"]) == []


def test_a_calibrated_run_gives_the_recorded_numbers() -> None:
    folder = FOLDER / "recorded_run"
    recipe = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    found = json.loads(json.dumps(plan_run(folder, recipe)))
    assert differences({name: found[name] for name in RECORDED["run"]}, RECORDED["run"]) == []
