"""The rooms of the simulator: imports point downward, and what ships from `validation` is what it computes."""

from __future__ import annotations

import ast
from copy import deepcopy
from pathlib import Path

import pytest

import forerun.simulate
from forerun.simulate.core.tables import load_table
from forerun.simulate.validation.constants import fit_round_constants, fit_serving_constants

ROOT = Path(forerun.simulate.__file__).parent
ABOVE = {"core": ("plan", "validation"), "plan": ("validation",), "validation": ("plan",)}
MEASURED = Path(__file__).parents[2] / "../shared/data/simulator/measured_decode.csv"


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("room", ABOVE)
def test_no_room_imports_one_above_it(room: str) -> None:
    files = list((ROOT / room).glob("*.py"))
    assert len(files) > 3
    for path in files:
        for above in ABOVE[room]:
            wrong = {name for name in imported_modules(path) if name.startswith(f"forerun.simulate.{above}")}
            assert not wrong, f"{path.name} imports {wrong}"


def test_the_simulator_imports_neither_drafters_nor_the_engine_nor_torch() -> None:
    allowed = {"errors", "report", "simulate", "tracking", "types"}
    for path in ROOT.rglob("*.py"):
        names = imported_modules(path)
        assert not names & {"torch", "pandas", "yaml", "pydantic"}, path.name
        rooms = {name.split(".")[1] for name in names if name.startswith("forerun.")}
        assert rooms <= allowed, f"{path.name} imports {rooms - allowed}"


def test_shipped_round_constants_are_those_of_the_published_runs() -> None:
    shipped, computed = load_table("round_constants"), fit_round_constants()
    assert shipped["source"] == computed["source"]
    assert shipped["error_of_c"] == pytest.approx(computed["error_of_c"], rel=1e-9)
    for name in ("rl", "serving"):
        assert shipped[name] == pytest.approx(computed[name], rel=1e-9)


@pytest.mark.skipif(not MEASURED.is_file(), reason=f"the measured rows are not at {MEASURED}")
def test_shipped_serving_constants_are_those_of_the_measured_rows() -> None:
    shipped, computed = deepcopy(load_table("serving_constants")), fit_serving_constants(MEASURED)
    for part in ("engines", "groups"):
        for entry, ours in zip(shipped[part], computed[part], strict=True):
            for name in ("key", "rows", "not_identified"):
                assert entry.pop(name) == ours.pop(name)
            assert entry == pytest.approx(ours, rel=1e-3)
