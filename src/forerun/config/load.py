"""Reads recipes: shipped ones by name, YAML files, and `dotted.key=value` overrides on top."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from forerun.config.messages import sentence
from forerun.config.overrides import parse_overrides, read_value
from forerun.config.recipe import Recipe
from forerun.errors import UserError

__all__ = ["load_recipe", "parse_overrides", "recipe_names"]


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("forerun.config") / "recipes"
    return sorted(Path(str(f)).stem for f in folder.iterdir() if str(f).endswith(".yaml"))


def load_recipe(recipe: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        recipe: shipped name ("quickstart") or path of a YAML file.
        overrides: dotted keys and values; strings as on the command line, see `overrides.py`.

    Raises UserError for an unknown recipe, broken YAML, an unknown key (with the nearest one), or a value out of range.
    """
    data = _read_yaml(recipe)
    for key, value in (overrides or {}).items():
        _set(data, key, read_value(Recipe, key, value) if isinstance(value, str) else value)
    data.setdefault("name", Path(recipe).stem)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(sentence(error, Recipe)) from None


def _read_yaml(recipe: str) -> dict[str, Any]:
    path = Path(recipe).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        names = recipe_names()
        if recipe not in names:
            near = difflib.get_close_matches(recipe, names, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"shipped recipes: {', '.join(names)}"
            raise UserError(f"No recipe is called '{recipe}'; {hint}")
        path = Path(str(resources.files("forerun.config") / "recipes" / f"{recipe}.yaml"))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no such date
        raise UserError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"The recipe {path} holds {type(data).__name__}, not a mapping of settings")
    return data


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        if data.get(name) is None:
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            raise UserError(f"'{dotted}' reaches into '{name}', which is a value and not a group of settings")
    data[last] = value
