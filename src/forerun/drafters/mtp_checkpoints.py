"""Names of multi-token-prediction heads in files, and ours.

Reads DeepSeek-V3's (one more layer of the policy per head), MiMo's and Qwen3-Next's; writes DeepSeek-V3's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

IDS = "draft_ids"  # a tensor of our own: published heads draft every token
OUTER = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "norm"}  # DeepSeek-V3: ours
MIMO = {"token_layernorm": "enorm", "hidden_layernorm": "hnorm", "input_proj": "eh_proj", "final_layernorm": "norm"}
QWEN = {"pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "fc": "eh_proj", "norm": "norm"}


def published_name(name: str, policy_layers: int) -> str:
    """Our parameter's name in a file: `layers.0.block.mlp.x` -> `model.layers.{policy_layers}.mlp.x`."""
    if name == IDS:
        return name
    _, index, rest = name.split(".", 2)
    prefix = f"model.layers.{policy_layers + int(index)}"
    if rest.startswith("block."):
        return f"{prefix}.{rest.removeprefix('block.')}"
    part, _, leaf = rest.rpartition(".")
    return f"{prefix}.{ {ours: theirs for theirs, ours in OUTER.items()}[part] }.{leaf}"


def read_heads(folder: Path, policy_layers: int) -> dict[str, Tensor]:
    """Tensors of multi-token-prediction heads in a folder of safetensors files, under our names; the rest is skipped.

    Read are DeepSeek-V3's names (`model.layers.{policy_layers + d}.eh_proj|enorm|hnorm|shared_head.norm|...`), MiMo's
    (`model.mtp_layers.{d}.input_proj|...`, hidden state first in its projection) and Qwen3-Next's (`mtp.fc|
    pre_fc_norm_*|norm`, one for all `mtp.layers.{d}`). Copies of the embedding and of the output head are skipped.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                ours = our_name(name, policy_layers)
                if ours is not None:
                    tensor = file.get_tensor(name)
                    found[ours] = _embedding_first(tensor) if name.endswith(".input_proj.weight") else tensor
    once = {name: t for name, t in found.items() if name.startswith("layers.*.")}
    depths = {name.split(".")[1] for name in found if name != IDS} - {"*"}
    apart = {n.replace("*", d, 1): t for n, t in once.items() for d in depths}
    return {n: t for n, t in found.items() if n not in once} | apart


def our_name(name: str, policy_layers: int) -> str | None:
    """Our name of a tensor in a file, None where it is not a head's. `layers.*`: of every layer."""
    if name == IDS:
        return name
    if match := re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)", name):
        index = int(match[1]) - policy_layers
        return None if index < 0 else _inner(index, match[2], OUTER)
    if match := re.fullmatch(r"model\.mtp_layers\.(\d+)\.(.+)", name):
        return _inner(int(match[1]), match[2], MIMO)
    if match := re.fullmatch(r"mtp\.layers\.(\d+)\.(.+)", name):
        return _inner(int(match[1]), match[2], {})
    if match := re.fullmatch(r"mtp\.(\w+)\.(weight|bias)", name):
        return None if match[1] not in QWEN else f"layers.*.{QWEN[match[1]]}.{match[2]}"
    return None


def _inner(index: int, rest: str, outer: Mapping[str, str]) -> str | None:
    part, _, leaf = rest.rpartition(".")
    if part in outer:
        return f"layers.{index}.{outer[part]}.{leaf}"
    return None if part in ("embed_tokens", "shared_head.head") else f"layers.{index}.block.{rest}"


def _embedding_first(weight: Tensor) -> Tensor:
    """[H, 2H] with the hidden state's columns first -> with the embedding's first."""
    hidden, embedding = weight.chunk(2, dim=1)
    return torch.cat([embedding, hidden], dim=1)
