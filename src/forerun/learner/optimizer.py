"""An optimizer over float32 masters. The live parameters may be bfloat16: they are what generates, the masters learn.

Gradients of all micro-batches are summed in float32. A float32 parameter is its own master: nothing is copied.

Masters are rounded to bfloat16 stochastically, up or down with the chances that make the mean right. An update of 1e-6
is a hundredth of the distance between two bfloat16 numbers around 0.02: rounded to the nearest, it would never reach
the policy that generates. Every weight has one draw for all updates, a hash of its place that its own device computes:
a weight that does not move stays as it is, and two versions differ by what was learnt.

Parameters that are sharded over ranks (float32 DTensors, see `fsdp.py`) are their own masters too: every rank clips by
the norm of the whole gradient and updates its part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from forerun.acceptance.random import INCREMENT, mix_bits
from forerun.config import TrainConfig
from forerun.learner.parallel import by_mesh, clip_gradients

AT_ONCE = {"cpu": 2**17, "cuda": 2**24}  # numbers rounded; on a CPU their random bits stay in a core's cache


class MasterOptimizer:
    """torch.optim's AdamW or SGD, as the recipe says, over float32 masters of `parameters`."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainConfig) -> None:
        self.live = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.live]
        self.max_grad_norm, self.updates = config.max_grad_norm, 0
        self.inner = _inner(self.masters, config)
        for live, master in zip(self.live, self.masters, strict=True):
            if live is not master:
                live.register_post_accumulate_grad_hook(_into(master))

    def step(self, learning_rate: float) -> float:
        """Clip the accumulated gradients, update masters and live parameters, clear. Returns the norm before."""
        norm = clip_gradients(self.masters, self.max_grad_norm)
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.updates += 1
        self.clear()
        self.round()
        return norm

    def clear(self) -> None:
        """Forget the accumulated gradients."""
        self.inner.zero_grad(set_to_none=True)

    @torch.no_grad()
    def round(self) -> None:
        """Write the masters into the live parameters."""
        for number, (live, master) in enumerate(zip(self.live, self.masters, strict=True)):
            if live is not master:
                live.copy_(stochastic_bfloat16(master, number) if live.dtype == torch.bfloat16 else master)

    def state_dict(self) -> dict[str, Any]:
        """Masters, the optimizer's moments and how often it has stepped."""
        masters = [m.detach() for m in self.masters]
        return {"masters": masters, "inner": self.inner.state_dict(), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; live parameters follow. Rate, betas, momentum and decay are those of the recipe."""
        own = [{key: value for key, value in g.items() if key != "params"} for g in self.inner.param_groups]
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.inner.load_state_dict(state["inner"])
        for group, settings in zip(self.inner.param_groups, own, strict=True):
            group.update(settings)
        self.updates = state["updates"]
        self.round()


def _inner(masters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW moves every weight by about the rate, noise or not; SGD moves them as far as their gradient says.

    With few samples per update, where most coordinates see only noise, that is worth a lot.
    """
    groups = [{"params": group} for group in by_mesh(masters)]  # of one mesh each, for steps over many at once
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, weight_decay=config.weight_decay)


def stochastic_bfloat16(values: Tensor, number: int) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 numbers, unbiased; numbers that are one stay as they are.

    The sixteen bits that bfloat16 cuts off say how far a number is on its way to the next: a random sixteen-bit number
    is added, and the carry decides.

    Args:
        number: of the tensor among those that are rounded; with the place in it, it decides the random number.
    """
    bits = values.contiguous().view(-1).view(torch.int32)
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    upper = rounded.view(-1).view(torch.int16)
    size = AT_ONCE.get(values.device.type, 2**17)
    for i, (part, out) in enumerate(zip(bits.split(size), upper.split(size), strict=True)):
        noise = _sixteen_bits(number, i * size, len(part), values.device).int().bitwise_and_(0xFFFF)
        out.copy_(noise.add_(part).bitwise_right_shift_(16))
    return rounded


def _sixteen_bits(number: int, start: int, count: int, device: torch.device) -> Tensor:
    """Random bits of places `start` (a multiple of 4) and on of a tensor, four of each hash. [count] int16"""
    counter = torch.arange(start // 4, (start + count + 3) // 4, device=device)
    return mix_bits((counter + (number << 40)) * INCREMENT).view(torch.int16)[:count]


def _into(master: nn.Parameter) -> Any:
    def accumulate(live: Tensor) -> None:
        assert live.grad is not None
        gradient = live.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        live.grad = None

    return accumulate
