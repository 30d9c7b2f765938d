"""Drafters: what proposes tokens for the policy to verify. `load_drafter` reads a recipe's speculation block."""

from __future__ import annotations

from collections.abc import Callable

from forerun.config import SpeculationConfig
from forerun.draft.base import Drafter, Rows
from forerun.errors import UserError
from forerun.models import Policy

__all__ = ["DRAFTERS", "Drafter", "Rows", "load_drafter"]


def _eagle3(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.draft.eagle3 import Eagle3Drafter
    from forerun.models.load import artifact

    if speculation.draft is None:
        raise UserError("speculation.method=eagle3 needs speculation.draft, a folder or a shipped artifact")
    return Eagle3Drafter.load(artifact(speculation.draft), policy)


DRAFTERS: dict[str, Callable[[Policy, SpeculationConfig], Drafter]] = {"eagle3": _eagle3}


def load_drafter(policy: Policy, speculation: SpeculationConfig) -> Drafter | None:
    """The drafter of a speculation block; None when speculation is off.

    Raises:
        UserError: it cannot be found, or does not fit the policy.
    """
    return None if speculation.tokens == 0 else DRAFTERS[speculation.method](policy, speculation)
