"""Names find their code, and a wrong one is answered with the nearest."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest

from forerun.errors import UserError
from forerun.registry import Registry, load_path

SHAPES = Registry("shape", {"circle": "math:tau", "square": "math:sqrt"})


def test_a_name_stands_for_what_its_entry_says() -> None:
    assert SHAPES.load("circle") == math.tau


def test_a_path_needs_no_entry() -> None:
    assert SHAPES.load("math:floor") is math.floor


def test_a_file_that_is_called_like_a_library_does_not_replace_it(tmp_path: Path) -> None:
    sys.modules.pop("colorsys", None)
    (tmp_path / "colorsys.py").write_text("def reward(problem, text):\n    return 1.0\n")
    assert load_path(f"{tmp_path}/colorsys.py:reward")(None, "") == 1.0
    assert importlib.import_module("colorsys").rgb_to_hsv(1, 0, 0) == (0, 1, 1)


def test_what_is_no_such_part_is_refused() -> None:
    shapes = Registry("shape", {"circle": "math:tau"}, members=("area", "edge"))
    with pytest.raises(UserError, match="'circle' is no shape: it has no area, no edge"):
        shapes.load("circle")


def test_a_typo_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"No shape is called 'cirle'; did you mean 'circle'\?"):
        SHAPES.load("cirle")


def test_a_name_far_from_all_lists_them() -> None:
    with pytest.raises(UserError, match="there are circle, square"):
        SHAPES.check("xyz")


@pytest.mark.parametrize("path", ["math:nothing", "no_such_module:f", ":f"])
def test_what_cannot_be_imported_is_a_sentence(path: str) -> None:
    with pytest.raises(UserError, match=f"The shape '{path}' cannot be imported"):
        SHAPES.load(path)
