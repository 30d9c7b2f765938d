"""`dotted.key=value`: what a value means follows from the setting's type.

Texts are taken as typed, numbers and switches are read by the settings model, lists and mappings are YAML. `null` is
None everywhere.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from forerun.config.messages import shown
from forerun.errors import UserError

SCALARS = (str, int, float, bool, NoneType)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`["train.steps=5"]` -> `{"train.steps": "5"}`.

    Raises UserError for an argument without "=".
    """
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            raise UserError(f"'{argument}' is not an override; write it as dotted.key=value, e.g. train.steps=5")
    return dict(argument.split("=", 1) for argument in arguments)


def read_value(block: type[BaseModel], key: str, text: str) -> Any:
    """The value that `text` stands for under a dotted key of `block`; the settings model still has to check it.

    Raises UserError where a list or mapping is not YAML.
    """
    kinds = _kinds(_annotation(block, key))
    nested = [kind for kind in kinds if kind not in SCALARS and get_origin(kind) is not Literal]
    if text == "null":
        return None
    bare = not text.lstrip().startswith(("[", "{"))
    if not nested or (bare and (len(kinds) > len(nested) or get_origin(nested[0]) in (list, tuple))):
        return text
    return read_yaml(key, text, yaml.BaseLoader if all(map(_holds_texts, nested)) else yaml.SafeLoader)


def read_yaml(key: str, text: str, loader: Any = yaml.SafeLoader) -> Any:
    """`text` as YAML; with BaseLoader what is in it stays text. Raises UserError when it is none."""
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
        raise UserError(
            f"'{key}': {shown(text)} is not YAML: {problem}; write a list as [a, b], a mapping as {{a: b}}, and quote "
            "texts with signs in them"
        ) from None


def _annotation(block: type[BaseModel], key: str) -> Any:
    """The type of a setting; Any for an unknown one and inside a free mapping."""
    kind: Any = block
    for name in key.split("."):
        groups = [k for k in _kinds(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
        if not groups or name not in groups[0].model_fields:
            return Any
        kind = groups[0].model_fields[name].annotation
    return kind


def _holds_texts(kind: Any) -> bool:
    return get_origin(kind) is list and str in _kinds(get_args(kind)[0])


def _kinds(annotation: Any) -> list[Any]:
    """The members of a union, without annotations."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _kinds(member)]
    return [annotation]
