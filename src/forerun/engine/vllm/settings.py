"""A recipe's speculation block in vLLM's words, and a refusal with its reason where vLLM has none for it.

vLLM's older model runner (its only one on a CPU) knows token rejection alone; block verification needs the newer one.
Both rules are exact; block verification keeps more of sampled drafts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.config import SpeculationConfig
from forerun.drafters.eagle3_checkpoints import head_files, read_head
from forerun.engine.vllm.proposer import SETTINGS
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.auxiliary import decoder_layers
from forerun.models.load import ALIASES, artifact
from forerun.workers.weights import Shapes, heated, shapes

REFUSED = {
    "mtp": "vLLM runs prediction heads only inside checkpoints of the architectures that were published with them, and "
    "these heads stand beside the policy",
    "graft": "vLLM has no exact verification of draft trees",
}
INSIDE = "mtp"  # how vLLM's methods end whose heads are layers of the policy's checkpoint
PROPOSER = "forerun.engine.vllm.proposer.TrieProposer"
WEIGHTED = ("eagle3", "model")  # methods whose drafter has weights that an engine must be given


@dataclass(frozen=True, slots=True)
class Translated:
    """What vLLM is told, and what the caller must be told."""

    config: dict[str, Any] | None  # vLLM's speculative_config; None: plain
    rule: str  # that verifies: "token" or "block"
    notes: tuple[str, ...] = ()


def translate(speculation: SpeculationConfig, draft: Path | None, block: bool) -> Translated:
    """The speculation block for vLLM.

    Args:
        draft: folder of the drafter, see `draft_files`; None for drafters without weights.
        block: whether vLLM's model runner has block verification.

    Raises:
        UserError: vLLM has nothing that does the same.
    """
    method, k = speculation.method, speculation.tokens
    if k == 0:
        return Translated(None, "plain")
    check(speculation)
    own: dict[str, Any] = {"num_speculative_tokens": k}
    if method == "ngram":
        own |= {"method": "ngram", **speculation.ngram.model_dump()}
    elif method == "trie":  # the drafts of vLLM's own suffix decoding come from all prompts
        own |= {"method": "custom_class", "model": PROPOSER}
    elif method != "vllm":
        own |= {"method": {"eagle3": "eagle3", "model": "draft_model"}[method], "model": str(draft)}
    samples = method in WEIGHTED or "model" in speculation.vllm
    sampled = speculation.proposal == "sampled"
    rule = speculation.verify if samples and sampled and block else "token"
    if samples:
        own["draft_sample_method"] = "probabilistic" if sampled else "greedy"
        own["rejection_sample_method"] = "block" if rule == "block" else "standard"
    notes = _rule_note(speculation, rule) if samples and sampled else ()
    return Translated(_merged(own, speculation), rule, (*notes, *_frozen_note(speculation)))


def additional(speculation: SpeculationConfig) -> dict[str, Any]:
    """What vLLM hands to our own classes in its worker, untouched: its `additional_config`."""
    if speculation.tokens == 0 or speculation.method != "trie":
        return {}
    return {SETTINGS: {**speculation.trie.model_dump(), "folder": speculation.draft}}


def check(speculation: SpeculationConfig) -> None:
    """Refuse what vLLM cannot do.

    Raises:
        UserError: with the reason and the way out.
    """
    method = speculation.method
    if method in REFUSED:
        raise UserError(
            f"speculation.method={method} does not run on the vLLM engine: {REFUSED[method]}; use the local engine, or "
            "method eagle3, model, trie or ngram"
        )
    inner = str(speculation.vllm.get("method", ""))
    if inner.endswith(INSIDE):
        raise UserError(
            f"speculation.vllm.method={inner}: its heads are layers of a published checkpoint, and vLLM is given "
            "the live policy, which has none; use the local engine with speculation.method=mtp"
        )
    if speculation.draft_temperature == "auto" or (speculation.draft_temperature != 1.0 and method != "eagle3"):
        raise UserError(
            f"speculation.draft_temperature={speculation.draft_temperature}: vLLM drafts at the temperature of the "
            "rollouts, and only the head of an EAGLE-3 drafter can be scaled to a fixed other one; set a number with "
            "method eagle3, leave it at 1, or use the local engine"
        )
    if method in WEIGHTED and speculation.draft is None:
        raise UserError(f"speculation.method={method} needs speculation.draft, the folder of the drafter")


def heat_of(speculation: SpeculationConfig) -> float:
    """Temperature of sampled drafts over that of the rollouts; see `check` for what it may be."""
    return 1.0 if speculation.draft_temperature == "auto" else speculation.draft_temperature


@dataclass(frozen=True, slots=True)
class DraftFiles:
    """A drafter as vLLM reads it, and as weight versions carry it."""

    folder: Path
    shapes: Shapes


def draft_files(speculation: SpeculationConfig, policy: Policy, source: Path, scratch: Path) -> DraftFiles | None:
    """Files of the drafter; None for methods without weights.

    An EAGLE-3 head of any dialect is read as the local engine reads it and written again for vLLM, whose runners
    number layers differently where a file leaves it open, and which has no place for the map of a full vocabulary. Its
    output head is divided by the draft temperature, which scales the logits just so.

    Args:
        policy: configuration and shapes, see `describe_policy`; its weights are in the folder `source`.

    Raises:
        UserError: the drafter cannot be read.
    """
    from safetensors.torch import save_file

    if speculation.tokens == 0 or speculation.method not in WEIGHTED:
        return None
    assert speculation.draft is not None
    if speculation.method == "model":
        folder = policy_folder(speculation.draft)
        return DraftFiles(folder, shapes(describe_policy(folder).model.state_dict()))
    head = read_head(artifact(speculation.draft), len(decoder_layers(policy.model)), _embedding(policy, source))
    data, tensors = head_files(head.config, head.state, "specforge")
    tensors["lm_head.weight"] = heated(tensors["lm_head.weight"], heat_of(speculation))
    if head.config.draft_vocab_size == head.config.vocab_size:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    folder = scratch / "drafter"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(data))
    save_file(tensors, folder / "model.safetensors")
    return DraftFiles(folder, shapes(head.state))


def describe_policy(folder: Path) -> Policy:
    """A policy's configuration, tokenizer, end tokens and tensor shapes, without its weights.

    Raises:
        UserError: the folder holds no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The model '{folder}' cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return Policy(model, tokenizer, str(folder))


def policy_folder(name: str) -> Path:
    """Folder of a model: an alias, a shipped artifact or a folder.

    Raises:
        UserError: it is none of these (hub names must be downloaded first: the engine checks what it loads).
    """
    return ALIASES[name]() if name in ALIASES else artifact(name)


def _merged(own: dict[str, Any], speculation: SpeculationConfig) -> dict[str, Any]:
    """With the entries that are handed on. Raises UserError where one of them would change another setting."""
    if taken := sorted(own.keys() & speculation.vllm.keys()):
        raise UserError(
            f"speculation.vllm.{taken[0]} is what speculation.method={speculation.method} and its neighbours say "
            f"already ({own[taken[0]]}); leave it out"
        )
    return {**own, **speculation.vllm}


def _frozen_note(speculation: SpeculationConfig) -> tuple[str, ...]:
    if speculation.method != "vllm" or "model" not in speculation.vllm:
        return ()
    return (
        f"vLLM's own drafter {speculation.vllm['model']} stays as its files are: nothing keeps it aligned with the "
        "policy; watch spec/acceptance_length",
    )


def _rule_note(speculation: SpeculationConfig, rule: str) -> tuple[str, ...]:
    if rule == speculation.verify:
        return ()
    return (
        f"speculation.verify={speculation.verify} needs vLLM's newer model runner, which does not run here: drafts are "
        f"verified by token rejection, as exact and a few percent shorter",
    )


def _embedding(policy: Policy, source: Path) -> Tensor:
    """The policy's input embedding [V, H], out of its files.

    Raises:
        UserError: no file holds it.
    """
    from safetensors import safe_open

    wanted = policy.model.get_input_embeddings().weight
    names = [name for name, parameter in policy.model.named_parameters() if parameter is wanted]
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if found := [name for name in names if name in file.keys()]:  # noqa: SIM118 (it is no mapping)
                return file.get_tensor(found[0])
    raise UserError(f"No safetensors file in {source} holds the policy's embedding, {' or '.join(names)}")
