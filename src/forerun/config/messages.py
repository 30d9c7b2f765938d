"""A failed validation as one sentence for the user: what, where, and the key that was probably meant."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def sentence(error: ValidationError, recipe: type[BaseModel]) -> str:
    """The first problem of a validation, as one sentence with the nearest key where a key is unknown."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        keys = known_keys(recipe)
        near = difflib.get_close_matches(where, keys, 1, cutoff=0.5)
        near = near or [k for k in keys if k.split(".")[-1] == where.split(".")[-1]][:1]
        hint = f"did you mean '{near[0]}'?" if near else f"the top-level keys are {', '.join(recipe.model_fields)}"
        return f"Unknown key '{where}'; {hint}"
    if first["type"] == "missing":
        return f"The recipe lacks '{where}', which has no default"
    message = " ".join(first["msg"].removeprefix("Value error, ").splitlines())
    if where == "":  # of several settings together: the message names them
        return message
    return f"'{where}': {message}" + (f" (got {shown(first['input'])})" if "input" in first else "")


def shown(value: Any, width: int = 120) -> str:
    """A value as Python writes it, without the middle of a long one."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 4 :]}"


def known_keys(block: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of a block and its sub-blocks."""
    keys: list[str] = []
    for name, field in block.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys
