"""A recipe's speculation block as vLLM's settings, and a refusal with its reason where vLLM has nothing for it.

vLLM's older model runner (its only one on a CPU) has token rejection alone; block verification needs the newer one.
Both rules are exact; block verification keeps more of sampled drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.config import SpeculationConfig
from forerun.drafters import DRAFTERS, Drafter
from forerun.errors import UserError

INSIDE = "mtp"  # how vLLM's methods end whose heads are layers of the policy's checkpoint
CUSTOM = "custom_class"  # vLLM's method for proposer classes of ours


@dataclass(frozen=True, slots=True)
class Translated:
    """Settings for vLLM, and notes for the user."""

    config: dict[str, Any] | None  # vLLM's speculative_config; None: plain
    rule: str  # that verifies: "token" or "block"
    notes: tuple[str, ...] = ()
    additional: dict[str, Any] = field(default_factory=dict)  # vLLM's additional_config, for proposer classes of ours


def translate(speculation: SpeculationConfig, draft: Path | None, block: bool) -> Translated:
    """The speculation block for vLLM.

    Args:
        draft: folder of the drafter, see `Drafter.vllm_files`; None for drafters without weights.
        block: whether vLLM's model runner has block verification.

    Raises:
        UserError: vLLM has nothing that does the same, or an entry of `speculation.vllm` would change another setting.
    """
    if speculation.tokens == 0:
        return Translated(None, "plain")
    drafter = check(speculation)
    own = {"num_speculative_tokens": speculation.tokens, **drafter.vllm_config(speculation, draft)}
    samples = drafter.samples or "model" in speculation.vllm
    sampled = speculation.proposal == "sampled"
    rule = speculation.verify if samples and sampled and block else "token"
    if samples:
        own["draft_sample_method"] = "probabilistic" if sampled else "greedy"
        own["rejection_sample_method"] = "block" if rule == "block" else "standard"
    notes = []
    if samples and sampled and rule != speculation.verify:
        notes.append(
            f"speculation.verify={speculation.verify} needs vLLM's newer model runner, which does not run here: drafts "
            "are verified by token rejection, as exact and a few percent shorter"
        )
    if "model" in speculation.vllm:
        notes.append(
            f"vLLM's own drafter {speculation.vllm['model']} stays as its files are: nothing keeps it aligned with the "
            "policy; watch spec/acceptance_length"
        )
    if taken := sorted(own.keys() & speculation.vllm.keys()):
        raise UserError(
            f"speculation.vllm.{taken[0]} is what speculation.method={speculation.method} and its neighbours say "
            f"already ({own[taken[0]]}); leave it out"
        )
    config = {**own, **speculation.vllm}
    return Translated(config, rule, tuple(notes), drafter.vllm_additional_config(speculation))


def check(speculation: SpeculationConfig) -> type[Drafter]:
    """The class of the drafter. Raises UserError, with the reason and the way out, for what vLLM cannot do."""
    method = speculation.method
    drafter: type[Drafter] = DRAFTERS.load(method)
    if drafter.vllm_refusal:
        raise UserError(
            f"speculation.method={method} does not run on the vLLM engine: {drafter.vllm_refusal}; use the local "
            "engine, or method eagle3, model, trie or ngram"
        )
    inner = str(speculation.vllm.get("method", ""))
    if inner.endswith(INSIDE):
        raise UserError(
            f"speculation.vllm.method={inner}: its heads are layers of a published checkpoint, and vLLM is given "
            "the live policy, which has none; use the local engine with speculation.method=mtp"
        )
    temperature = speculation.draft_temperature
    if temperature == "auto" or (temperature != 1.0 and not drafter.vllm_scales_drafts):
        raise UserError(
            f"speculation.draft_temperature={temperature}: vLLM drafts at the temperature of the "
            "rollouts, and only the head of an EAGLE-3 drafter can be scaled to a fixed other one; set a number with "
            "method eagle3, leave it at 1, or use the local engine"
        )
    if drafter.trains and speculation.draft is None:
        raise UserError(f"speculation.method={method} needs speculation.draft, the folder of the drafter")
    return drafter
