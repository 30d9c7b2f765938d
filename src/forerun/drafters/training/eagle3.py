"""A new EAGLE-3 head for a policy, started from the policy's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from forerun.config import DraftConfig
from forerun.drafters.eagle3 import Eagle3Config, Eagle3Head
from forerun.drafters.training.heads import Pair, frequent_tokens
from forerun.models import Policy
from forerun.models.auxiliary import decoder_layers, default_aux_layers


def new_head(policy: Policy, pairs: Sequence[Pair], config: DraftConfig) -> Eagle3Head:
    """A head for this policy, started from the policy's own last layer and output head.

    Its draft vocabulary: see `frequent_tokens`.
    """
    target = policy.model.config.get_text_config()
    layers = tuple(config.layers or default_aux_layers(target.num_hidden_layers))
    vocabulary = frequent_tokens(pairs, config.vocab)
    rope = getattr(target, "rope_parameters", None) or {}
    head = Eagle3Head(
        Eagle3Config(
            hidden_size=target.hidden_size,
            intermediate_size=config.intermediate or target.intermediate_size,
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=target.num_key_value_heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=len(vocabulary),
            layers=layers,
            rms_norm_eps=float(getattr(target, "rms_norm_eps", 1e-5)),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            max_position_embeddings=target.max_position_embeddings,
        )
    )
    head.set_vocabulary(vocabulary)
    _start_from(head, policy.model)
    return head.to(policy.device)


@torch.no_grad()
def _start_from(head: Eagle3Head, model: Any) -> None:
    """Copy what has the same meaning and shape in the policy's last layer; the last auxiliary state is passed on."""
    layer, own = decoder_layers(model)[-1], head.midlayer
    head.fc.weight.normal_(0, 0.01)
    head.fc.weight[:, -head.config.hidden_size :] += torch.eye(head.config.hidden_size, device=head.fc.weight.device)
    head.lm_head.weight.copy_(model.get_output_embeddings().weight[head.vocabulary])
    copies = [  # ours, and theirs, which may be missing
        (own["self_attn"]["o_proj"].weight, _weight(layer, "self_attn", "o_proj")),
        (own["post_attention_layernorm"].weight, _weight(layer, "post_attention_layernorm")),
        (own["hidden_norm"].weight, _weight(layer, "input_layernorm")),
        (head.norm.weight, _weight(model.base_model, "norm")),
    ]
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = own["self_attn"][name].weight
        weight.normal_(0, 0.02)
        copies.append((weight[:, head.config.hidden_size :], _weight(layer, "self_attn", name)))
    for name in ("gate_proj", "up_proj", "down_proj"):
        copies.append((own["mlp"][name].weight, _weight(layer, "mlp", name)))
    for mine, theirs in copies:
        if theirs is not None and theirs.shape == mine.shape:
            mine.copy_(theirs)


def _weight(module: Any, *path: str) -> Any:
    """The weight of a submodule; None where there is none of that name."""
    for name in (*path, "weight"):
        module = getattr(module, name, None)
    return module
