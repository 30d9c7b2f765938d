"""Folders of drafters: config.json with model.safetensors or another file of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.checks import spoiled_file


def write_drafter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@contextmanager
def reading(what: str, folder: Path | None = None) -> Iterator[None]:
    """Turns whatever missing or broken files raise within into a UserError: `what` cannot be read.

    Args:
        folder: in which the broken file is looked for, to name it.
    """
    from huggingface_hub.errors import StrictDataclassError  # of a configuration that contradicts itself
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # ValueError: also broken JSON
        found = None if folder is None else spoiled_file(folder)
        raise UserError(f"{what} cannot be read: {found or reason}") from error


def check_fit(policy: Policy, made_for: Mapping[str, Any]) -> None:
    """Raises UserError when an entry of the policy's configuration is not what a drafter was made for."""
    target = policy.model.config.get_text_config()
    for name, value in made_for.items():
        if value != getattr(target, name):
            raise UserError(
                f"The drafter was made for a policy with {name} {value}, and this one has {getattr(target, name)}"
            )
