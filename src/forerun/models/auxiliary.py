"""Auxiliary hidden states: those of a policy that a drafter reads, by layer.

Auxiliary layer i is the *input* of decoder layer i, i.e. the output of layer i - 1 (0: the embeddings). This is vLLM's
numbering of `eagle_aux_hidden_state_layer_ids`; a drafter's config.json is the one place where the numbers are written.
Auxiliary layer n of a model of n layers is its last hidden state, *after* the final norm: what its output head reads.
"""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from forerun.errors import UserError


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers of a Hugging Face causal language model.

    Raises UserError when it has none that is as long as its configuration says.
    """
    decoder = model.get_decoder()
    if hasattr(decoder, "layers"):
        return decoder.layers
    count = model.config.get_text_config().num_hidden_layers
    for child in decoder.children():  # GPT-2's is called h
        if isinstance(child, torch.nn.ModuleList) and len(child) == count:
            return child
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers, which a drafter or learner needs")


def default_aux_layers(layers: int) -> tuple[int, int, int]:
    """Early, middle and late: 2, n/2, n - 3 as in EAGLE-3, distinct for models of few layers."""
    if layers >= 7:
        return 2, layers // 2, layers - 3
    return 0, layers // 2, max(layers - 1, 0)


def check_aux_layers(aux_layers: tuple[int, ...], layers: int) -> None:
    """Raises UserError when an auxiliary layer is outside 0 .. layers - 1."""
    outside = [t for t in aux_layers if not 0 <= t < layers]
    if outside:
        raise UserError(
            f"The drafter reads the input of layers {list(aux_layers)}, but the policy has layers 0 to {layers - 1}"
        )


class AuxiliaryStates:
    """Context that keeps the auxiliary hidden states of a model's forward."""

    def __init__(self, model: Any, aux_layers: tuple[int, ...]) -> None:
        self._model, self._aux_layers = model, aux_layers
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> AuxiliaryStates:
        for index in self._aux_layers:
            layers = decoder_layers(self._model)
            if index == len(layers):
                handle = self._model.get_decoder().register_forward_hook(partial(self._keep_last, index))
            else:
                handle = layers[index].register_forward_pre_hook(partial(self._keep, index), with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def features(self) -> Tensor | None:
        """Those of the latest forward, detached, concatenated [B, n, T·H]; None without auxiliary layers."""
        return torch.cat([self._seen[index] for index in self._aux_layers], dim=-1) if self._aux_layers else None

    def _keep(self, index: int, _: Any, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        hidden = (arguments[0] if arguments else keywords["hidden_states"]).detach()
        if hidden.dim() != 3:
            raise UserError(
                f"{type(self._model).__name__} has several hidden states per token, and a head reads one; use "
                "speculation.method=ngram, trie or model"
            )
        self._seen[index] = hidden

    def _keep_last(self, index: int, _: Any, arguments: Any, out: Any) -> None:
        self._seen[index] = (out[0] if isinstance(out, tuple) else out.last_hidden_state).detach()
