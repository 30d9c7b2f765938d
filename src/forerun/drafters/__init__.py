"""Drafters: what proposes tokens for the policy to verify. One file each, and one line in `DRAFTERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.drafters.base import Drafter, Rows
from forerun.models import Policy
from forerun.registry import DRAFTERS

if TYPE_CHECKING:  # an engine with a drafter needs no recipe, and so no pydantic
    from forerun.config import SpeculationConfig

__all__ = ["DRAFTERS", "Drafter", "Rows", "load_drafter"]


def load_drafter(policy: Policy, speculation: SpeculationConfig) -> Drafter | None:
    """The drafter of a speculation block; None when speculation is off.

    Raises UserError when it cannot be found, or does not fit the policy.
    """
    if speculation.tokens == 0:
        return None
    drafter: Drafter = DRAFTERS.load(speculation.method).from_config(policy, speculation)
    return drafter
