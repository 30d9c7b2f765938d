"""Faults for `forerun verify --inject`: negative controls, each of which the verification must detect.

Broken acceptance rules come from acceptance/broken.py; the others break what a rule reports or what a load promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from forerun.acceptance.broken import BROKEN, BROKEN_TREE
from forerun.acceptance.chain import log_q_of_tokens, verify
from forerun.acceptance.tree import verify_tree
from forerun.config import RolloutConfig
from forerun.engine import Weights
from forerun.engine.local.engine import LocalEngine, Verify, VerifyTree
from forerun.errors import UserError
from forerun.types import VerifyInput, VerifyResult


def draft_logprobs(rule: str, inputs: VerifyInput) -> VerifyResult:
    """Accepted tokens carry the drafter's log-probability."""
    result = verify(rule, inputs)
    k = inputs.draft.tokens.shape[1]
    accepted = torch.arange(k, device=result.tokens.device) < result.accepted[:, None]
    logprobs = result.logprobs.clone()
    logprobs[:, :k] = torch.where(accepted, log_q_of_tokens(inputs.draft).float(), logprobs[:, :k])
    return replace(result, logprobs=logprobs)


def neighbour_logprobs(rule: str, inputs: VerifyInput) -> VerifyResult:
    """Every token carries the log-probability that the row after its own gives it."""
    result, temperature = verify(rule, inputs), inputs.temperature
    scaled = inputs.target_logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None, None]
    shifted = scaled.roll(-1, 1).log_softmax(-1).gather(2, result.tokens[..., None])[..., 0]
    place = torch.arange(scaled.shape[1], device=scaled.device)
    return replace(result, logprobs=torch.where(place <= result.accepted[:, None], shifted, 0.0))


def silent_load(engine: LocalEngine) -> None:
    """The engine answers every load with the weights it was given and checks nothing."""

    def load(weights: Weights) -> Weights:
        return weights

    engine.load = load  # type: ignore[method-assign]


_VERIFIERS: dict[str, Verify] = {"draft_logprobs": draft_logprobs, "neighbour_logprobs": neighbour_logprobs}
_ENGINE_FAULTS: dict[str, Callable[[LocalEngine], None]] = {"silent_load": silent_load}
# Too small for these sample sizes: they change the distribution only behind accepted drafts. On the quickstart's policy
# 512 texts gave the latter two p = 0.22 to 0.79, where a missing residual has 1e-41. tests/acceptance catches them.
_TOO_MILD = ("block_residual_unweighted", "block_without_clip", "shared_uniform")
FAULTS = (*(name for name in BROKEN if name not in _TOO_MILD), *_VERIFIERS, *_ENGINE_FAULTS)  # of the local engine
UPSTREAM = "upstream"  # of vLLM on a CPU: its own fault, not patched (engine/vllm/patches.py)


def check_fault(fault: str, rollout: RolloutConfig) -> None:
    """Refuse what cannot be injected into the recipe's engine.

    Raises:
        UserError: no such fault, or another engine has it.
    """
    known = (UPSTREAM,) if rollout.engine == "vllm" else FAULTS
    if fault not in known:
        raise UserError(
            f"There is no fault '{fault}' to inject into the engine '{rollout.engine}'; its faults are "
            f"{', '.join(known)}"
        )
    if rollout.replicas:
        raise UserError(f"Faults are injected into an engine of this process; rollout.replicas is {rollout.replicas}")


def verifier_of(fault: str | None) -> Verify:
    """The verifier to build the local engine with."""
    if fault in BROKEN:
        broken = BROKEN[fault]
        return lambda _, inputs: broken(inputs)
    return _VERIFIERS.get(fault or "", verify)


def tree_verifier_of(fault: str | None) -> VerifyTree:
    """The verifier of draft trees to build the engine with; BROKEN_TREE has the counterparts of faults of chains.

    Raises:
        UserError: trees have no such fault.
    """
    if fault is None or fault in _ENGINE_FAULTS or fault not in FAULTS:
        return verify_tree
    if fault not in BROKEN_TREE:
        raise UserError(f"The fault '{fault}' is one of chains; for draft trees there are {', '.join(BROKEN_TREE)}")
    broken = BROKEN_TREE[fault]
    return lambda _, inputs: broken(inputs)


def break_engine(engine: Any, fault: str | None) -> None:
    """Inject a fault that is not in the verifier."""
    if fault in _ENGINE_FAULTS:
        _ENGINE_FAULTS[fault](engine)
    elif fault == UPSTREAM:
        engine.patches = False
