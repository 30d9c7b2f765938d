"""Masters and the bfloat16 parameters that live: small updates arrive, and a restored optimizer rounds alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from forerun.config import TrainConfig
from forerun.learner.optimizer import MasterOptimizer, stochastic_bfloat16


def make(size: int = 4096, **changes: Any) -> tuple[nn.Parameter, MasterOptimizer]:
    torch.manual_seed(0)
    live = nn.Parameter((torch.randn(size) * 0.1).bfloat16())
    return live, MasterOptimizer([live], TrainConfig(**changes))


def push(live: nn.Parameter, optimizer: MasterOptimizer, steps: int, rate: float = 1e-6) -> None:
    for _ in range(steps):
        live.sum().backward()
        optimizer.step(rate)


def test_rounding_is_unbiased_and_keeps_what_fits() -> None:
    source = torch.Generator().manual_seed(1)
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # three tenths of the way from 1 to the next bfloat16
    rounded = stochastic_bfloat16(value, source).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float((rounded > 1).float().mean()) - 0.3) < 0.006  # six standard errors
    negative = stochastic_bfloat16(-value, source).float()
    assert abs(float((negative < -1).float().mean()) - 0.3) < 0.006
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_bfloat16(exact.float(), source), exact)


def test_updates_far_below_a_bfloat16_step_arrive_in_the_mean() -> None:
    live, optimizer = make(200_000)
    before = live.detach().float().mean()
    push(live, optimizer, 5)
    moved = float(before - live.detach().float().mean())
    assert 0.7 * 5e-6 < moved < 1.3 * 5e-6  # Adam moves every weight by the rate; nearest rounding would move few
    nearest = optimizer.masters[0].detach().bfloat16().float().mean()
    assert float(before - nearest) < 0.5 * 5e-6, "rounding to nearest would do as well: the test shows nothing"


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "momentum": 0.9}])
def test_a_restored_optimizer_goes_on_bit_for_bit(changes: dict[str, Any]) -> None:
    one, first = make(**changes)
    push(one, first, 3)
    saved, kept = copy.deepcopy(first.state_dict()), one.detach().clone()
    other, second = make(**changes)
    second.load_state_dict(saved)
    assert torch.equal(other, kept) and second.updates == 3
    push(one, first, 2)
    push(other, second, 2)
    assert torch.equal(one, other)


def test_sgd_moves_weights_by_their_gradient() -> None:
    live, optimizer = make(optimizer="sgd", max_grad_norm=1e9)
    before = optimizer.masters[0].detach().clone()
    slope = torch.linspace(0, 1, live.numel())
    (live.float() * slope).sum().backward()
    optimizer.step(0.1)
    torch.testing.assert_close(
        before - optimizer.masters[0].detach(), 0.1 * slope.bfloat16().float(), atol=1e-6, rtol=0
    )
