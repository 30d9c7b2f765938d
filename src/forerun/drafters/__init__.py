"""Drafters: what proposes tokens for the policy to verify. `load_drafter` reads a recipe's speculation block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from forerun.drafters.base import Drafter, Rows
from forerun.errors import UserError
from forerun.models import Policy

if TYPE_CHECKING:  # an engine with a drafter needs no recipe, and so no pydantic
    from forerun.config import SpeculationConfig

__all__ = ["DRAFTERS", "TRAINED", "Drafter", "Rows", "load_drafter"]


def _eagle3(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.drafters.eagle3 import Eagle3Drafter
    from forerun.models.load import artifact

    if speculation.draft is None:
        raise UserError("speculation.method=eagle3 needs speculation.draft, a folder or a shipped artifact")
    return Eagle3Drafter.load(
        artifact(speculation.draft), policy, proposal=speculation.proposal, heat=speculation.draft_temperature
    )


def _mtp(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.drafters.mtp import MtpDrafter
    from forerun.models.load import artifact

    if speculation.draft is None:
        raise UserError(
            "speculation.method=mtp needs speculation.draft, the folder of the heads or of a policy that carries them"
        )
    return MtpDrafter.load(
        artifact(speculation.draft), policy, proposal=speculation.proposal, heat=speculation.draft_temperature
    )


def _ngram(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.drafters.ngram import NgramDrafter

    _refuse_heat(speculation)
    return NgramDrafter(speculation.ngram)


def _trie(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.drafters.trie import TrieDrafter

    _refuse_heat(speculation)
    if speculation.draft is None:
        return TrieDrafter(speculation.trie)
    return TrieDrafter.load(Path(speculation.draft), speculation.trie)


def _refuse_heat(speculation: SpeculationConfig) -> None:
    if speculation.draft_temperature != 1.0:
        raise UserError(
            f"speculation.draft_temperature={speculation.draft_temperature} asks for sampled drafts, but "
            f"method={speculation.method} looks its drafts up; leave it at 1"
        )


def _model(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.drafters.draft_model import ModelDrafter

    if speculation.draft is None:
        raise UserError("speculation.method=model needs speculation.draft, a folder or hub name of a smaller model")
    return ModelDrafter.load(
        speculation.draft, policy, proposal=speculation.proposal, heat=speculation.draft_temperature
    )


def _graft(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.drafters.graft import GraftDrafter
    from forerun.models.load import artifact

    if speculation.draft is None:
        raise UserError(
            "speculation.method=graft needs speculation.draft, the folder or artifact of an EAGLE-3 drafter"
        )
    heat = speculation.draft_temperature
    if heat == "auto":
        raise UserError("speculation.draft_temperature=auto needs sampled drafts, but a graft tree samples none")
    return GraftDrafter.load(artifact(speculation.draft), policy, speculation.graft, heat=heat)


def _vllm(policy: Policy, speculation: SpeculationConfig) -> Drafter:
    from forerun.drafters.vllm_native import ForeignDrafter

    return ForeignDrafter(speculation.vllm)


DRAFTERS: dict[str, Callable[[Policy, SpeculationConfig], Drafter]] = {
    "eagle3": _eagle3,
    "mtp": _mtp,
    "ngram": _ngram,
    "trie": _trie,
    "model": _model,
    "graft": _graft,
    "vllm": _vllm,
}
TRAINED = frozenset({"eagle3", "mtp", "model", "graft"})  # their weights must exist or be trained first


def load_drafter(policy: Policy, speculation: SpeculationConfig) -> Drafter | None:
    """The drafter of a speculation block; None when speculation is off.

    Raises:
        UserError: it cannot be found, or does not fit the policy.
    """
    return None if speculation.tokens == 0 else DRAFTERS[speculation.method](policy, speculation)
