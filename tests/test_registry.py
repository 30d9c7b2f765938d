"""Names find their code, and a wrong one is answered with the nearest."""

from __future__ import annotations

import math

import pytest

from forerun.errors import UserError
from forerun.registry import Registry

SHAPES = Registry("shape", {"circle": "math:tau", "square": "math:sqrt"})


def test_a_name_stands_for_what_its_entry_says() -> None:
    assert SHAPES.load("circle") == math.tau


def test_a_path_needs_no_entry() -> None:
    assert SHAPES.load("math:floor") is math.floor


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
