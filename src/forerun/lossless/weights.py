"""Claim: the engine holds the weights that it reports, policy and drafter under one version.

A missing, partial or stale drafter must be an error; a bad drafter under a valid version must raise the acceptance
alarm. Rollouts stay exact in every case: these failures cost speed, and unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from forerun.drafters import Drafter
from forerun.engine import RolloutEngine, Sampling, Weights
from forerun.engine.staleness import COLLAPSE, ROUNDS, Acceptance, collapsed
from forerun.errors import UserError
from forerun.lossless.verdict import Check

ALARM_PROMPTS, ALARM_TOKENS = 8, 32
_MARGIN = 0.15  # the engine reads the first rounds only


def weight_checks(
    engine: RolloutEngine, drafter: Drafter, weights: Callable[[int], Weights], prompts: list[list[int]]
) -> list[Check]:
    """Load right and wrong versions; afterwards the engine holds the right one again."""
    right = weights(1)
    policy, draft = right.checksums["policy"], right.checksums["draft"]
    without = replace(right, version=2, checksums={"policy": policy}, draft=None)
    wrong = ("f" if draft.startswith("0") else "0") * len(draft)  # without weights the right one is all zeros
    stale = replace(right, version=3, checksums={"policy": policy, "draft": wrong})
    checks = [
        _accepted_load(engine, right),
        _refused(engine, without, "missing drafter"),
        _refused(engine, stale, "stale drafter"),
        _alarm(engine, drafter, weights, prompts),
    ]
    engine.load(weights(9))
    return checks


def _accepted_load(engine: RolloutEngine, right: Weights) -> Check:
    try:
        held = engine.load(right)
    except UserError as error:
        return Check("right version", False, f"refused: {error}", {})
    agrees = held.version == right.version and dict(held.checksums) == dict(right.checksums)
    return Check("right version", agrees, f"version {held.version} held, its checksums {_agree(agrees)}", {})


def _agree(agrees: bool) -> str:
    return "are the published ones" if agrees else "are not the published ones"


def _refused(engine: RolloutEngine, weights: Weights, name: str) -> Check:
    try:
        engine.load(weights)
    except UserError as error:
        return Check(name, True, f"refused: {error}", {})
    return Check(name, False, "the load was accepted", {})


def _alarm(
    engine: RolloutEngine, drafter: Drafter, weights: Callable[[int], Weights], prompts: list[list[int]]
) -> Check:
    """Replace the drafter's weights by noise under a correct checksum: the next rounds must warn."""
    chosen = (prompts * ALARM_PROMPTS)[: max(ALARM_PROMPTS, len(prompts))]
    sampling = Sampling(ALARM_TOKENS, 1.0, 5, ignore_eos=True)
    good = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    if not good:
        return Check("alarm", True, f"'{drafter.name}' has no weights that could go stale", {})
    engine.load(weights(4))
    before = _accepted(engine, chosen, sampling)
    known = len(engine.metrics()["warnings"])
    drafter.load_state_dict(_noise(good))
    engine.load(weights(5))
    after = _accepted(engine, chosen, sampling)
    raised = engine.metrics()["warnings"][known:]
    drafter.load_state_dict(good)
    return _alarm_check(before, after, raised)


def _accepted(engine: RolloutEngine, prompts: list[list[int]], sampling: Sampling) -> float:
    """Accepted drafts a round while generating."""
    first = engine.metrics()
    list(engine.stream(prompts, sampling))
    last = engine.metrics()
    tokens = [(m["acceptance_length"] or 0.0) * m["rounds"] for m in (first, last)]
    return (tokens[1] - tokens[0]) / (last["rounds"] - first["rounds"]) - 1


def _alarm_check(before: float, after: float, raised: list[str]) -> Check:
    """The alarm is due when acceptance collapsed, and only then; near the threshold either answer is right."""
    seen = f"{before:.2f} accepted drafts a round, {after:.2f} with shuffled weights"
    numbers = {"accepted_before": before, "accepted_after": after, "warnings": float(len(raised))}
    first_rounds = (Acceptance(round(ROUNDS * x), ROUNDS, x) for x in (before, after + _MARGIN * before))
    if collapsed(*first_rounds):
        return Check("alarm", bool(raised), f"{seen}: {'the engine warned' if raised else 'and no warning'}", numbers)
    quiet = not raised or after < (COLLAPSE + _MARGIN) * before
    return Check("alarm", quiet, f"{seen}: this drafter has too little to lose for an alarm", numbers)


def _noise(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with every floating-point matrix shuffled: right in size and scale, and senseless."""
    source = torch.Generator().manual_seed(0)

    def shuffled(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dim() < 2:
            return tensor
        order = torch.randperm(tensor.numel(), generator=source).to(tensor.device)
        return tensor.flatten()[order].view_as(tensor)

    return {name: shuffled(tensor) for name, tensor in state.items()}
