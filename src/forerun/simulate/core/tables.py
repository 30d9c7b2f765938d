"""The JSON tables of the package: hardware, model shapes, constants of engines, published measurements."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def load_table(name: str, room: str = "core") -> dict[str, Any]:
    """`data/<name>.json` of a room of the simulator, parsed once."""
    return json.loads((files(f"forerun.simulate.{room}") / "data" / f"{name}.json").read_text(encoding="utf-8"))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
