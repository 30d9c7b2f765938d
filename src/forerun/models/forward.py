"""The live policy's forward over cache rows: its own module and its own parameters, no copy of any weight.

Any Transformers model that takes a cache runs unchanged (`interface.py`); that it then computes what its plain forward
computes is for `engine/local/self_check.py` to prove. Llama-like ones run the fused forward of `models/fused.py` over
the same parameters (1.20x, 1.14x, 1.07x as fast at batch 1, 8, 32 on a CPU), whose reference this one is.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.auxiliary import AuxiliaryStates
from forerun.models.cache import SlotPass
from forerun.models.fused import FusedForward
from forerun.models.interface import attending
from forerun.models.recurrent import recurrent_modules, token_by_token

TREE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})  # maskable to a path of a tree
CACHES = ("past_key_values", "cache_params")  # names of the cache among a forward's arguments


class PolicyForward:
    """Logits and auxiliary hidden states of a policy over the rows of a cache."""

    def __init__(self, policy: Policy, aux_layers: tuple[int, ...], fused: bool = True) -> None:
        self.policy = policy
        self.aux_layers = aux_layers
        self.fused = FusedForward(policy.model) if fused and FusedForward.fits(policy.model) else None
        self._recurrent = recurrent_modules(policy.model)

    @property
    def recurrent(self) -> bool:
        """Whether layers keep a state: rows that enter a fresh pass must then be of one length."""
        return bool(self._recurrent)

    def refresh(self) -> None:
        """Fuse the parameters again if they were moved or replaced."""
        if self.fused is not None and not self.fused.current():
            self.fused = FusedForward(self.policy.model)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, slots: SlotPass, head: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Run tokens [B, n] at the pass's rows and positions. `SlotPass.keep` says which of them stay.

        Returns:
            logits [B, n, V] (None without `head`); auxiliary hidden states [B, n, T·H] (None without layers).
        """
        if self.fused is not None:
            return self.fused(tokens, slots, self.aux_layers, head)
        model: Any = self.policy.model
        run = model if head else model.base_model
        stepping = [] if slots.fresh or slots.tokens == 1 else self._recurrent
        with (
            attending(model, slots) as cache,
            AuxiliaryStates(model, self.aux_layers) as aux_layers,
            token_by_token(stepping, slots.states),
        ):
            out = run(input_ids=tokens, use_cache=True, **_arguments(run, cache, slots.positions))
        return (out.logits if head else None), aux_layers.features()


def _arguments(model: Any, cache: Any, positions: Tensor) -> dict[str, Any]:
    """The cache and, where the model takes them, the positions.

    Raises UserError when the model takes no cache.
    """
    names = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in names), None)
    if name is None:
        raise UserError(f"{type(model).__name__} takes no cache")
    return {name: cache} | ({"position_ids": positions} if "position_ids" in names else {})


def longest_text(policy: Policy) -> int | None:
    """Tokens up to which a token's layers depend on its own text alone; None: any number.

    Beyond it some models compute with the longest position of the whole batch: Llama 4 scales its queries, a "longrope"
    changes its frequencies, which cached keys do not follow.
    """
    config = policy.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [r.get("original_max_position_embeddings") for r in ropes if r.get("rope_type") == "longrope"]
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(config.floor_scale - 1)
    return min((int(limit) for limit in limits if limit is not None), default=None)


def check_trees(policy: Policy) -> None:
    """Raises UserError when a policy cannot run draft trees: mixing tokens other than by attention mixes branches."""
    config = policy.model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ()) - TREE_LAYERS
    if recurrent_modules(policy.model):
        types |= {"recurrent layers"}
    elif "position_ids" not in inspect.signature(policy.model.forward).parameters:
        types |= {"no position_ids"}
    if types:
        raise UserError(
            f"Draft trees need full or sliding-window attention in every layer, but '{policy.name}' has "
            f"{', '.join(sorted(types))}; use a drafter that proposes chains, e.g. speculation.method=eagle3"
        )
