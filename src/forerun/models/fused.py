"""A fused forward for Llama-like decoders, over the parameters of the Transformers module.

Same arithmetic, fewer and larger operations: query, key and value are one product, gate and up are one product. Their
weights are moved into shared storage of which the module's parameters become views: training updates the module,
generation reads the same bytes. Rotary angles come from the module's own rotary embedding.
Only for: pre-norm RMSNorm, rotary positions, SwiGLU, no bias after attention or MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Views of one decoder layer's parameters."""

    qkv: Tensor  # [(H + 2K)·D, hidden]
    qkv_bias: Tensor | None
    out: Tensor
    gate_up: Tensor  # [2·intermediate, hidden]
    down: Tensor
    norm_in: Any  # the module's own RMSNorms
    norm_mid: Any
    norm_q: Any | None  # Qwen3 normalises queries and keys per head
    norm_k: Any | None
    scale: float
    slides: bool  # whether it sees a window of the text alone: `config.sliding_window`, read at every pass


class FusedForward:
    """Forward of a Llama-like model over cache rows; see `models/forward.py` for the reference."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        types = getattr(config, "layer_types", None)  # None: Mistral, whose layers all slide if any does, and Llama
        slides = [types is None or kind == "sliding_attention" for kind in types or model.model.layers]
        self.layers = [self._fuse(layer, slide) for layer, slide in zip(model.model.layers, slides, strict=True)]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this forward computes what the module computes."""
        config = model.config
        plain = not getattr(config, "mlp_bias", False) and getattr(config, "hidden_act", "") == "silu"
        return type(model).__name__ in FAMILIES and plain and model.model.layers[0].self_attn.o_proj.bias is None

    def current(self) -> bool:
        """Whether the module's parameters are still the views made here; moving or replacing them breaks that."""
        first, last = self.model.model.layers[0], self.model.model.layers[-1]
        pairs = ((self.layers[0], first), (self.layers[-1], last))
        return all(
            ours.qkv.data_ptr() == theirs.self_attn.q_proj.weight.data_ptr()
            and ours.gate_up.data_ptr() == theirs.mlp.gate_proj.weight.data_ptr()
            and ours.down is theirs.mlp.down_proj.weight
            for ours, theirs in pairs
        )

    def __call__(
        self, tokens: Tensor, slots: Any, aux_layers: tuple[int, ...], head: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """tokens [B, n] -> logits [B, n, V] or None, auxiliary hidden states [B, n, T·H] or None."""
        trunk = self.model.model
        hidden = trunk.embed_tokens(tokens)
        cos, sin = trunk.rotary_emb(hidden, slots.positions)
        rotation = cos[:, :, None], rotate_sign(sin)[:, :, None]  # [B, n, 1, D]
        seen: dict[int, Tensor] = {}
        window = getattr(self.model.config, "sliding_window", None)
        for index, layer in enumerate(self.layers):
            if index in aux_layers:
                seen[index] = hidden
            x = rms_norm(layer.norm_in, hidden)
            hidden = hidden + self._attention(index, layer, x, rotation, slots, window if layer.slides else None)
            gate, up = F.linear(rms_norm(layer.norm_mid, hidden), layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        final = len(self.layers)
        if head or final in aux_layers:
            hidden = seen[final] = rms_norm(trunk.norm, hidden)
        logits = self.model.lm_head(hidden) if head else None
        return logits, torch.cat([seen[layer] for layer in aux_layers], dim=-1) if aux_layers else None

    def _attention(
        self, index: int, layer: FusedLayer, x: Tensor, rotation: tuple[Tensor, Tensor], slots: Any, window: int | None
    ) -> Tensor:
        batch, n, _ = x.shape
        heads, kv_heads = self.heads, self.kv_heads
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(batch, n, heads + 2 * kv_heads, self.size)
        query_key, value = qkv[:, :, : heads + kv_heads], qkv[:, :, heads + kv_heads :]
        if layer.norm_q is not None:
            query, key = query_key[:, :, :heads], query_key[:, :, heads:]
            query_key = torch.cat([rms_norm(layer.norm_q, query), rms_norm(layer.norm_k, key)], dim=2)
        query_key = query_key * rotation[0] + swap_halves(query_key) * rotation[1]
        query, key = query_key[:, :, :heads], query_key[:, :, heads:]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = slots.attend(index, query, key, value, layer.scale, window)
        return F.linear(out.reshape(batch, n, -1), layer.out)

    def _fuse(self, layer: Any, slides: bool) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        return FusedLayer(
            qkv=share_storage([p.weight for p in projections]),
            qkv_bias=share_storage([p.bias for p in projections]) if projections[0].bias is not None else None,
            out=attention.o_proj.weight,
            gate_up=share_storage([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
            norm_in=layer.input_layernorm,
            norm_mid=layer.post_attention_layernorm,
            norm_q=getattr(attention, "q_norm", None),
            norm_k=getattr(attention, "k_norm", None),
            scale=float(attention.scaling),
            slides=slides,
        )


def share_storage(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor of all rows, of which every parameter becomes a view: the same bytes under both names."""
    if (joined := _joined(parameters)) is not None:
        return joined
    whole = torch.cat([p.detach() for p in parameters], dim=0)
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + parameter.shape[0]]
        start += parameter.shape[0]
    return whole


def _joined(parameters: list[nn.Parameter]) -> Tensor | None:
    """The tensor of all rows if the parameters are adjacent in one storage, else None."""
    first, place = parameters[0].detach(), parameters[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != place or parameter.untyped_storage().data_ptr() != storage:
            return None
        place += parameter.numel() * parameter.element_size()
    shape = (sum(p.shape[0] for p in parameters), *first.shape[1:])
    return torch.as_strided(first, shape, first.stride())


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """The module's RMSNorm as one operation."""
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def swap_halves(x: Tensor) -> Tensor:
    """[a, b] -> [b, a] along the last axis; the sign of the rotation is in `rotate_sign`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((b, a), dim=-1)


def rotate_sign(sin: Tensor) -> Tensor:
    """sin with its first half negated: x·cos + swap(x)·this is the rotary rotation."""
    a, b = sin.chunk(2, dim=-1)
    return torch.cat((-a, b), dim=-1)
