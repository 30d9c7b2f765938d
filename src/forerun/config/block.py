"""What every group of settings is made of: the base class, and the types of fields that need a check."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from forerun.errors import UserError
from forerun.registry import Registry, load_path

DType = Literal["auto", "float32", "bfloat16"]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, or a name that stands for one


def known_to(registry: Registry | str, *others: str) -> AfterValidator:
    """Validates a name of `registry` or `others`, or the path "package.module:Name" of a part from elsewhere.

    Args:
        registry: or where it is, for one whose package reads recipes itself.
    """

    def check(name: str) -> str:
        try:
            if name not in others:
                (load_path(registry) if isinstance(registry, str) else registry).check(name)
        except UserError as error:
            raise ValueError(str(error)) from None
        return name

    return AfterValidator(check)


class Block(BaseModel):
    """A group of settings. Unknown keys are an error, and a loaded recipe does not change any more."""

    model_config = ConfigDict(extra="forbid", frozen=True)
