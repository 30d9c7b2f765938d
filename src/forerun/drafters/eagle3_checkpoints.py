"""Checkpoint formats of EAGLE-3 heads: published ones are read, ours are written so that others can read them.

Dialects, recognised by config.json:
- "specforge": a flat Llama config (SpecForge, SafeAILab/EAGLE, AngelSlim, ModelOpt).
- "speculators": the layer's config nested in `transformer_layer_config`; what is missing there has that class's default
  (vllm-project/speculators, models/eagle3/config.py).
- "forerun": flat, with a description of its training under "forerun".

Conventions and their sources
- Tensors: `midlayer.*` (EAGLE cnets.py, SpecForge draft/llama3_eagle.py) or `layers.0.*` (speculators), with `model.`
  in front or without; vLLM renames the former (llama_eagle3.py, load_weights).
- Layers: `eagle_aux_hidden_state_layer_ids` at the top is vLLM's and speculators' and numbers layer *inputs*, as
  models/auxiliary.py does (vllm .../eagle3_utils.py; "if idx in aux_hidden_state_layers" before layer idx runs). Inside
  `eagle_config` it is SGLang's and ModelOpt's and numbers layer *outputs*: one less for the same tensor (sglang
  models/llama.py, set_eagle3_layers_to_capture: "val + 1"); vLLM's older runner takes those unshifted
  (gpu_model_runner.py), so our files carry both. Older files of ours have inputs there. Without either, the inputs of
  2, n/2, n - 3 (vLLM, SGLang; EAGLE modeling_llama_kv.py), joined in the order of the layers.
- d2t: offsets, target id = draft id + d2t (sglang llama_eagle3.py; speculators core.py). Absolute ids are also read.
- Norms: `norm_before_residual`, `norm_before_fc` (`input_norm`) and EAGLE-3.1's `fc_norm` and `norm_output` (vLLM
  llama_eagle3.py), at the top or in `eagle_config` (ModelOpt, TensorRT-LLM modeling_speculative.py:
  `return_hidden_post_norm`). q_norm and k_norm come with Qwen3 layers (speculators).
Refused: more than one layer, P-EAGLE, MLA, sliding windows, quantised heads, heads without an output head of their own,
rotary scaling that depends on the length of the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.drafters.files import reading
from forerun.errors import UserError
from forerun.models.auxiliary import default_aux_layers

LAYOUTS = ("specforge", "speculators")
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
ROPES = ("default", "linear", "llama3", "yarn")
LAYER = (  # entries of config.json that are fields of `Eagle3Config`
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "rms_norm_eps", "max_position_embeddings", "attention_bias", "mlp_bias", "rope_theta",
)  # fmt: skip
SHAPE = (*LAYER, "hidden_act", "rope_scaling", "rope_parameters")
NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")  # of a flat config
MUST_BE: dict[str, tuple[Any, ...]] = {  # what this head does not compute otherwise; absent is fine
    "num_hidden_layers": (1,), "hidden_act": ("silu",), "use_aux_hidden_state": (True,), "logit_scale": (1.0,),
    "partial_rotary_factor": (1.0,), "use_sliding_window": (False,), "parallel_drafting": (False,), "bias": (False,),
    "eh_proj_before_attn": (False,), "use_mtp_layernorm": (False,), "use_last_layernorm": (False,),
}  # fmt: skip
Data = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shape of the head. `layers` is the one source of truth for what it reads (numbered as in models/auxiliary.py)."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the policy's
    draft_vocab_size: int
    layers: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    rope_scaling: Mapping[str, Any] | None = None  # Transformers' rope parameters of a scaled rotary embedding
    target_hidden_size: int | None = None  # the policy's; None: the head's
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_before_residual: bool = False  # the residual of the attention is the normed state
    norm_before_fc: bool = False  # one norm over the concatenated auxiliary states
    fc_norm: bool = False  # a norm per auxiliary state
    norm_output: bool = False  # the state that is fed back is normed
    own_embedding: bool = False

    @property
    def aux_width(self) -> int:
        """Width of one auxiliary hidden state: the policy's hidden size."""
        return self.target_hidden_size or self.hidden_size

    @property
    def kept_bytes(self) -> int:
        """Bytes per token that a pass of training keeps for its backward pass, in float32."""
        heads = self.num_attention_heads + self.num_key_value_heads
        return 4 * (11 * self.hidden_size + 4 * self.intermediate_size + 2 * heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class HeadFile:
    """A head as read: its shape, the tensors under the head's own names, and the dialect of its files."""

    config: Eagle3Config
    state: dict[str, Tensor]
    dialect: str


def read_head(folder: Path, policy_layers: int, embedding: Tensor) -> HeadFile:
    """Read config.json and the weights (safetensors, or a pytorch_model.bin) of a head in any dialect.

    Args:
        embedding: [V, H] of the policy; a copy of it in the file is dropped.

    Raises UserError when files are missing or broken, or describe what this head does not compute.
    """
    with reading(f"The drafter in {folder}", folder):
        data = json.loads((folder / "config.json").read_text())
        found = {_our_name(name): tensor for name, tensor in _tensors(folder).items()}
        dialect = _dialect(data)
        config = _config(data, dialect, policy_layers)
    found = {n: t for n, t in found.items() if not n.endswith("inv_freq") and n != "verifier_lm_head.weight"}
    if "lm_head.weight" not in found:
        raise UserError(f"The drafter in {folder} has no lm_head.weight; one that borrows the policy's is not read")
    own = found.get("embed_tokens.weight")
    if own is not None and own.shape == embedding.shape and torch.equal(own.to(embedding), embedding):
        del found["embed_tokens.weight"]
    elif own is None and config.hidden_size != config.aux_width:
        raise UserError(
            f"The drafter has hidden size {config.hidden_size} and no embed_tokens.weight, and the policy has "
            f"{config.aux_width}: it needs an embedding of its own"
        )
    config = replace(
        config,
        own_embedding="embed_tokens.weight" in found,
        qk_norm="midlayer.self_attn.q_norm.weight" in found,
    )
    return HeadFile(config, _with_vocabulary(found, config), dialect)


def head_files(config: Eagle3Config, state: Mapping[str, Tensor], layout: str) -> tuple[Data, dict[str, Tensor]]:
    """config.json and tensors of a head in one of `LAYOUTS`, both of which vLLM reads."""
    if layout not in LAYOUTS:
        raise UserError(f"A drafter is written in the layout {' or '.join(LAYOUTS)}, not '{layout}'")
    tensors = dict(state)
    layer = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{name: getattr(config, name) for name in LAYER},
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    shared = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.aux_width,
        "eagle_aux_hidden_state_layer_ids": list(config.layers),
        **{name: getattr(config, name) for name in NORMS},
    }
    if layout == "speculators":
        tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
        about = {"speculators_model_type": "eagle3", "transformer_layer_config": layer, "tie_word_embeddings": False}
        return {"architectures": ["Eagle3DraftModel"], **about, **shared}, tensors
    architecture = "Eagle3Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLMEagle3"
    outputs = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.layers]}
    return {"architectures": [architecture], **layer, **shared, "eagle_config": outputs}, tensors


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    paths = sorted(folder.glob("*.safetensors"))
    paths = [path for path in paths if path.name.startswith(("model", "eagle"))] or paths
    if paths:
        return {name: tensor for path in paths for name, tensor in load_file(path).items()}
    try:
        return dict(torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin") from None
    except Exception as error:  # torch.load raises whatever the bytes provoke
        raise UserError(f"{folder / 'pytorch_model.bin'} cannot be read: {type(error).__name__}: {error}") from error


def _our_name(name: str) -> str:
    name = name.removeprefix("model.")
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _dialect(data: Data) -> str:
    if (kind := data.get("speculators_model_type")) is not None:
        if kind != "eagle3":
            raise UserError(f"The drafter is a speculators model of type '{kind}'; only 'eagle3' is read here")
        return "speculators"
    if "forerun" in data:
        return "forerun"
    names = [str(name) for name in data.get("architectures", [])]
    if "draft_vocab_size" in data or any("eagle3" in name.lower() for name in names):
        return "specforge"
    raise UserError(
        f"config.json (architectures {names}) is of no EAGLE-3 head: it has neither speculators_model_type, nor "
        "draft_vocab_size, nor an architecture of that name"
    )


def _config(data: Data, dialect: str, policy_layers: int) -> Eagle3Config:
    """The head's shape, without what only the tensors show (own embedding, norms of q and k)."""
    nested = data.get("eagle_config") or {}
    layer = dict(data["transformer_layer_config"]) if dialect == "speculators" else data
    for part in (data, nested, layer):
        _refuse(part)
    shape = _layer_shape(layer, dialect)
    if dialect == "speculators" and "norm_before_residual" not in data:
        raise UserError(
            "The drafter's config.json lacks norm_before_residual, which its own library takes as false and vLLM as "
            "true; add the one it was trained with"
        )
    norms = {name: bool(nested.get(name, data.get(name, False))) for name in NORMS}
    norms["norm_output"] |= bool(nested.get("return_hidden_post_norm", False))
    rope = dict(shape.rope_parameters)
    theta = float(rope.pop("rope_theta", 10000.0))
    target = data.get("target_hidden_size")
    return Eagle3Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim or shape.hidden_size // shape.num_attention_heads,
        vocab_size=shape.vocab_size,
        draft_vocab_size=data.get("draft_vocab_size") or shape.vocab_size,
        layers=_layers(data, nested, dialect, policy_layers),
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=theta,
        max_position_embeddings=shape.max_position_embeddings,
        rope_scaling=None if rope.get("rope_type", "default") == "default" else rope,
        target_hidden_size=None if target == shape.hidden_size else target,
        attention_bias=bool(shape.attention_bias),
        mlp_bias=bool(getattr(shape, "mlp_bias", False)),
        **norms,
    )


def _layer_shape(layer: Data, dialect: str) -> Any:
    """The decoder layer's config as Transformers completes it, rotary parameters in their present form."""
    from transformers import LlamaConfig, Qwen3Config

    kind = layer.get("model_type", "llama")
    if kind not in ("llama", "qwen3"):
        raise UserError(f"The drafter's layer is of model_type '{kind}'; llama and qwen3 are read")
    if dialect != "speculators" and (missing := [name for name in NEEDED if name not in layer]):
        raise UserError(f"The drafter's config.json lacks {', '.join(missing)}")
    given = {name: layer[name] for name in SHAPE if layer.get(name) is not None}
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPES or "mrope_section" in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"The drafter's rotary embedding is {rope}; of the kinds {', '.join(ROPES)} it can be read")
    return (LlamaConfig if kind == "llama" else Qwen3Config)(**given)


def _refuse(data: Data) -> None:
    for name, accepted in MUST_BE.items():
        if data.get(name) is not None and data[name] not in accepted:
            raise UserError(f"The drafter's config.json has {name} {data[name]}; only {accepted[0]} is computed here")
    if any("full" not in str(kind) for kind in data.get("layer_types") or []):
        raise UserError(f"The drafter's layer has layer_types {data['layer_types']}; only full attention is computed")
    if data.get("quantization_config"):
        raise UserError("The drafter's weights are quantised; export it without quantization_config")


def _layers(data: Data, nested: Data, dialect: str, policy_layers: int) -> tuple[int, ...]:
    """Auxiliary layers, numbered as in models/auxiliary.py; for the dialects see the module's docstring."""
    name = "eagle_aux_hidden_state_layer_ids"
    inputs, outputs = data.get(name), nested.get(name)
    if dialect == "forerun":
        if not (ours := inputs or outputs):
            raise UserError(f"The drafter's config.json does not say which layers it reads ({name})")
        return tuple(ours)
    if inputs:
        return tuple(sorted(inputs))
    if outputs:
        return tuple(sorted(layer + 1 for layer in outputs))
    if policy_layers < 7:
        raise UserError(
            f"The drafter's config.json does not say which layers it reads ({name}), and the usual 2, n/2, n - 3 are "
            f"not three layers of a policy with {policy_layers}"
        )
    return default_aux_layers(policy_layers)


def _with_vocabulary(found: dict[str, Tensor], config: Eagle3Config) -> dict[str, Tensor]:
    """d2t as offsets of ascending ids and t2d to match; rows of the output head are sorted with them."""
    state = {name: tensor for name, tensor in found.items() if name not in ("d2t", "t2d")}
    size = config.draft_vocab_size
    if "d2t" in found:
        ids = _target_ids(found["d2t"].long(), found.get("t2d"), config.vocab_size)
    elif size == config.vocab_size:
        ids = torch.arange(size)
    else:
        raise UserError(f"The drafter has {size} of {config.vocab_size} tokens and no d2t that says which")
    if len(ids) != size or len(state["lm_head.weight"]) != size:
        rows = len(state["lm_head.weight"])
        raise UserError(f"draft_vocab_size is {size}, but d2t has {len(ids)} entries and lm_head {rows} rows")
    order = ids.argsort()
    state["lm_head.weight"] = state["lm_head.weight"][order]
    state["d2t"] = ids[order] - torch.arange(size)
    state["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
    state["t2d"][ids] = True
    return state


def _target_ids(d2t: Tensor, t2d: Tensor | None, vocabulary: int) -> Tensor:
    """Target ids [D] of draft ids, from offsets or from absolute ids; t2d [V], if present, shows which.

    Without it, offsets are what is published; only a d2t that never repeats a value could be either, for neighbouring
    tokens have the same offset.
    """
    offsets = d2t + torch.arange(len(d2t))
    marked = None if t2d is None else t2d.bool().nonzero()[:, 0]

    def fits(ids: Tensor) -> bool:
        found = ids.sort().values
        if len(found) == 0 or int(found[0]) < 0 or int(found[-1]) >= vocabulary or bool((found.diff() == 0).any()):
            return False
        return marked is None or torch.equal(found, marked)

    readings = [ids for ids in (offsets, d2t) if fits(ids)]
    if not readings:
        raise UserError(
            f"d2t is neither {len(d2t)} offsets nor as many target ids of {vocabulary} tokens"
            + ("" if marked is None else f" that agree with the {len(marked)} tokens of t2d")
        )
    if len(readings) == 2 and not torch.equal(*readings):
        raise UserError("d2t could be offsets or target ids, and there is no t2d that says which; add t2d to the file")
    return readings[0]
