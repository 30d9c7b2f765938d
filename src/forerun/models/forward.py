"""The live policy's forward over cache rows: its own module and its own parameters, no copy of any weight.

Any Transformers model that uses the attention interface runs unchanged; Llama-like ones run the fused forward of
`models/fused.py` over the same parameters (1.20x, 1.14x, 1.07x as fast at batch 1, 8, 32 on a CPU), whose reference
this one is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.auxiliary import AuxiliaryStates
from forerun.models.cache import SlotPass, slot_attention
from forerun.models.fused import FusedForward

ATTENTION = "forerun_slots"
TREE_LAYERS = frozenset({"full_attention", "sliding_attention"})  # layer types that can be masked to one path of a tree
AttentionInterface.register(ATTENTION, slot_attention)


class PolicyForward:
    """Logits and auxiliary hidden states of a policy over the rows of a cache."""

    def __init__(self, policy: Policy, aux_layers: tuple[int, ...], fused: bool = True) -> None:
        self.policy = policy
        self.aux_layers = aux_layers
        self.fused = FusedForward(policy.model) if fused and FusedForward.fits(policy.model) else None

    def refresh(self) -> None:
        """Fuse the parameters again if they were moved or replaced."""
        if self.fused is not None and not self.fused.current():
            self.fused = FusedForward(self.policy.model)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, slots: SlotPass, head: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Run tokens [B, n] at the pass's rows and positions.

        Returns:
            logits [B, n, V] (None without `head`); auxiliary hidden states [B, n, T·H] (None without layers).
        """
        if self.fused is not None:
            return self.fused(tokens, slots, self.aux_layers, head)
        model: Any = self.policy.model
        run = model if head else model.base_model
        with slot_attention_of(model), AuxiliaryStates(model, self.aux_layers) as aux_layers:
            out = run(input_ids=tokens, position_ids=slots.positions, use_cache=False, slots=slots)
        return (out.logits if head else None), aux_layers.features()


def check_trees(policy: Policy) -> None:
    """Raises UserError when a policy cannot run draft trees: mixing tokens other than by attention mixes branches."""
    config = policy.model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ()) - TREE_LAYERS
    if types:
        raise UserError(
            f"Draft trees need full or sliding-window attention in every layer, but '{policy.name}' has "
            f"{', '.join(sorted(types))}; use a drafter that proposes chains, e.g. speculation.method=eagle3"
        )


@contextmanager
def slot_attention_of(model: Any) -> Iterator[None]:
    """Context in which the model attends over cache rows; outside it keeps its own attention (the learner's)."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
