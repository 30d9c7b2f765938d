"""States of recurrent layers: short convolutions, linear attention, state spaces. One state per cache row.

A state has no positions: once a token went through, it cannot be taken out again. So a pass works on a copy of its
rows' states, and of several tokens it remembers the state after each; `PassStates.keep` writes back the one after the
last accepted token. A pass that keeps nothing changes nothing. Padding must never enter a state: rows that are read
together have the same length.
Axes: R rows, B rows of one pass, n tokens per row, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

StateName = tuple[str, int, int]  # "conv" or "recurrent", layer, number within the layer


@dataclass(slots=True)
class RowStates:
    """States of all rows of a cache, allocated at their first write."""

    rows: int
    tensors: dict[StateName, Tensor] = field(default_factory=dict)  # name -> [R, ...]

    def write(self, name: StateName, rows: slice, state: Tensor) -> None:
        """Set the states of some rows: [B, ...]."""
        if name not in self.tensors:
            self.tensors[name] = state.new_zeros(self.rows, *state.shape[1:])
        self.tensors[name][rows] = state

    def copy(self, source: int, target: int) -> None:
        """Give row `target` the states of row `source`."""
        for tensor in self.tensors.values():
            tensor[target] = tensor[source]

    def clear(self, rows: slice) -> None:
        """The states before any token."""
        for tensor in self.tensors.values():
            tensor[rows] = 0


@dataclass(slots=True)
class PassStates:
    """The states of a pass's rows while it runs."""

    stored: RowStates
    rows: slice
    fresh: bool  # no token went through yet
    now: dict[StateName, Tensor] = field(default_factory=dict)  # [B, ...]; modules may write into them
    after: dict[StateName, list[Tensor]] = field(default_factory=dict)  # after each token of a pass of several

    def get(self, name: StateName) -> Tensor | None:
        """The state as it is now, None before any token."""
        if name not in self.now and not self.fresh and name in self.stored.tensors:
            self.now[name] = self.stored.tensors[name][self.rows].clone()
        return self.now.get(name)

    def put(self, name: StateName, state: Tensor) -> Tensor:
        """Replace a state."""
        self.now[name] = state
        return state

    def convolve(self, name: StateName, inputs: Tensor, size: int | None) -> Tensor:
        """Append inputs [B, C, n] to a convolution's latest ones; returns all of them [B, C, at least n]."""
        past = self.get(name)
        size = size or (inputs.shape[-1] if past is None else past.shape[-1])
        whole = inputs if past is None else torch.cat([past, inputs], dim=-1)
        whole = F.pad(whole, (max(0, size - whole.shape[-1]), 0))
        self.put(name, whole[..., -size:].clone())
        return whole

    def remember(self, layer: int) -> None:
        """Keep a copy of a layer's states: a token went through it."""
        for name, state in self.now.items():
            if name[1] == layer:
                self.after.setdefault(name, []).append(state.clone())

    def keep(self, last: Tensor | None) -> None:
        """Write the states back as they were after token last[b] of row b, [B] int64; None: after all tokens."""
        for name, state in self.now.items():
            if last is not None and name in self.after:
                state = torch.stack(self.after[name])[last, torch.arange(len(last), device=last.device)]
            self.stored.write(name, self.rows, state)


def recurrent_modules(model: nn.Module) -> list[Any]:
    """The layers of a Transformers model that keep a state: all of them begin with a convolution."""
    return [
        m for m in model.modules() if hasattr(m, "layer_idx") and any(isinstance(c, nn.Conv1d) for c in m.children())
    ]


@contextmanager
def token_by_token(modules: list[Any], states: PassStates) -> Iterator[None]:
    """Context in which recurrent modules take one token after the other, and `states` remembers each.

    Everything else runs over all tokens at once, as ever.
    """
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = _stepwise(module.forward, module.layer_idx, states)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward  # the class's own is under it
            else:
                module.forward = forward


def _stepwise(forward: Callable[..., Tensor], layer: int, states: PassStates) -> Callable[..., Tensor]:
    def steps(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:  # [B, n, H] -> [B, n, H]
        outs = []
        for token in hidden_states.split(1, dim=1):
            outs.append(forward(token, *arguments, **keywords))
            states.remember(layer)
        return torch.cat(outs, dim=1)

    return steps
