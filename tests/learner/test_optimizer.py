"""Masters and the bfloat16 parameters that live: small updates arrive, and a restored optimizer rounds alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forerun.config import TrainConfig
from forerun.learner.optimizer import AT_ONCE, MasterOptimizer, stochastic_bfloat16
from forerun.models import load_policy


def make(size: int = 4096, **changes: Any) -> tuple[nn.Parameter, MasterOptimizer]:
    torch.manual_seed(0)
    live = nn.Parameter((torch.randn(size) * 0.1).bfloat16())
    return live, MasterOptimizer([live], TrainConfig(**changes))


def push(live: nn.Parameter, optimizer: MasterOptimizer, steps: int, rate: float = 1e-6) -> None:
    for _ in range(steps):
        live.sum().backward()
        optimizer.step(rate)


def test_rounding_is_unbiased_and_keeps_what_fits() -> None:
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # three tenths of the way from 1 to the next bfloat16
    rounded = stochastic_bfloat16(value, 1).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float((rounded > 1).float().mean()) - 0.3) < 0.006  # six standard errors
    negative = stochastic_bfloat16(-value, 1).float()
    assert abs(float((negative < -1).float().mean()) - 0.3) < 0.006
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_bfloat16(exact.float(), 1), exact)


def test_random_bits_are_uniform_in_every_place_of_a_hash_and_their_neighbours_independent() -> None:
    """How many are rounded up, of numbers that are 0/16 to 15/16 of the way to the next bfloat16."""
    count = 2**20
    fraction = torch.arange(16).repeat_interleave(count // 16)  # of sixteen
    values = ((127 << 23) + (fraction << 12)).int().view(torch.float32)
    for number in (0, 1, 2**20):
        up = (stochastic_bfloat16(values, number).float() > 1).float()
        expected = fraction / 16
        error = (up - expected).view(16, -1, 4)
        assert float(error.mean((1, 2)).abs().max()) < 6 * 0.5 / (count / 16) ** 0.5
        assert float(error.mean((0, 1)).abs().max()) < 6 * 0.5 / (count / 4) ** 0.5  # of the four of a hash
        for shift in (1, 2, 4, 64):
            products = (up - expected)[shift:] * (up - expected)[:-shift]
            assert abs(float(products.mean())) < 6 * 0.25 / count**0.5, shift
    biased = (values.bfloat16().float() > 1).float()  # the control: to the nearest
    assert float((biased - fraction / 16).view(16, -1).mean(1).abs().max()) > 0.4


def test_the_parts_of_a_tensor_and_its_views_are_rounded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(300, 7)
    whole = stochastic_bfloat16(values, 3)
    assert torch.equal(whole, stochastic_bfloat16(values, 3))
    assert not torch.equal(whole, stochastic_bfloat16(values, 4))
    assert torch.equal(whole, stochastic_bfloat16(values.T.contiguous().T, 3))
    monkeypatch.setitem(AT_ONCE, "cpu", 64)
    assert torch.equal(whole, stochastic_bfloat16(values, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_rounds_alike() -> None:
    values = torch.randn(1001, 77)
    assert torch.equal(stochastic_bfloat16(values, 3), stochastic_bfloat16(values.cuda(), 3).cpu())


def test_weights_that_do_not_move_stay_as_they_are() -> None:
    live, optimizer = make()
    push(live, optimizer, 1)
    kept = live.detach().clone()
    assert not torch.equal(kept.float(), optimizer.masters[0].detach())  # they are between two numbers
    for _ in range(100):
        (live * 0.0).sum().backward()
        optimizer.step(0.0)
        assert torch.equal(live, kept)


def test_consecutive_versions_differ_by_what_was_learnt(tiny: Callable[..., Path]) -> None:
    """A step of 1e-6 from masters that lie anywhere between two bfloat16 numbers, against the same step drawn anew."""
    policy = load_policy(str(tiny("llama")), "bfloat16", "cpu")
    optimizer = MasterOptimizer(policy.model.parameters(), TrainConfig())
    tokens = torch.arange(60).view(3, 20) % 50

    def learn() -> None:
        policy.model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step(1e-6)

    def log_p() -> torch.Tensor:
        exact = copy.deepcopy(policy.model).float()  # of the rounded weights
        with torch.no_grad():
            return exact(input_ids=tokens).logits.log_softmax(-1)

    with torch.no_grad():
        for master in optimizer.masters:
            master.mul_(1 + torch.rand_like(master) / 128)
    optimizer.round()
    before = log_p()
    learn()
    moved = _kl(before, log_p())
    for number, (live, master) in enumerate(zip(optimizer.live, optimizer.masters, strict=True)):
        live.data.copy_(stochastic_bfloat16(master, 1000 + number))
    assert 0 < moved < _kl(before, log_p()) / 30


def _kl(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.exp().double() * (one - other).double()).sum(-1).mean())


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
