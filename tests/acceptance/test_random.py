"""The counter-based uniforms are uniform, independent between streams, and the same in any batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from chi_square import LEVEL, p_value, sigmas_of_detection
from forerun.acceptance.random import Purpose, inverse_cdf, inverse_cdf_log, round_keys, uniforms
from forerun.types import Draft, VerifyInput

SEEDS = torch.arange(64)
POSITIONS = torch.arange(2048).repeat(64, 1)


def bins(u: torch.Tensor, count: int) -> torch.Tensor:
    return (u * count).long()


def flat_p_value(cells: torch.Tensor, count: int) -> float:
    return p_value(cells.flatten().bincount(minlength=count), torch.full((count,), 1 / count))


@pytest.mark.parametrize("purpose", list(Purpose))
def test_uniforms_are_uniform(purpose: Purpose) -> None:
    u = uniforms(SEEDS, POSITIONS, purpose)
    assert u.dtype == torch.float64 and bool(((u > 0) & (u < 1)).all())
    assert flat_p_value(bins(u, 64), 64) > LEVEL
    assert flat_p_value(bins((u * 2**20) % 1, 64), 64) > LEVEL  # the low bits too


def test_a_small_bias_is_caught() -> None:
    assert sigmas_of_detection(SEEDS.numel() * POSITIONS.shape[1], 64, 4 * 0.022**2) > 5  # 2.2 % in total variation
    u = uniforms(SEEDS, POSITIONS, Purpose.ACCEPT)
    assert flat_p_value(bins(u**1.05, 64), 64) < LEVEL


def test_streams_are_independent_in_pairs() -> None:
    streams = {
        "draft": uniforms(SEEDS, POSITIONS, Purpose.DRAFT),
        "accept": uniforms(SEEDS, POSITIONS, Purpose.ACCEPT),
        "residual": uniforms(SEEDS, POSITIONS, Purpose.RESIDUAL),
        "next position": uniforms(SEEDS, POSITIONS + 1, Purpose.ACCEPT),
        "next seed": uniforms(SEEDS + 1, POSITIONS, Purpose.ACCEPT),
        "negated seed": uniforms(-SEEDS - 1, POSITIONS, Purpose.ACCEPT),
        "next lane": uniforms(SEEDS, POSITIONS, Purpose.ACCEPT, lane=1),
    }
    for (one, a), (other, b) in itertools.combinations(streams.items(), 2):
        assert flat_p_value(bins(a, 16) * 16 + bins(b, 16), 256) > LEVEL, (one, other)


def test_adjacent_seeds_and_positions_are_independent_within_a_stream() -> None:
    u = bins(uniforms(torch.arange(512), torch.arange(256).repeat(512, 1), Purpose.ACCEPT), 8)
    assert flat_p_value(u[:, :-2] * 64 + u[:, 1:-1] * 8 + u[:, 2:], 512) > LEVEL
    assert flat_p_value(u[:-2] * 64 + u[1:-1] * 8 + u[2:], 512) > LEVEL
    assert flat_p_value(u[:-1, :-1] * 64 + u[1:, :-1] * 8 + u[:-1, 1:], 512) > LEVEL


def test_no_two_draws_are_equal() -> None:
    draws = [uniforms(SEEDS, POSITIONS[:, :256], purpose, lane) for purpose in Purpose for lane in range(3)]
    every = torch.stack(draws).flatten()
    assert len(every.unique()) == len(every)


def test_a_number_depends_on_its_key_only() -> None:
    seeds = torch.tensor([5, -7, 2**62, -(2**63)])
    positions = torch.tensor([[0, 9, 4], [1, 1, 2], [10**12, 3, 3], [8, 0, 1]])
    whole = uniforms(seeds, positions, Purpose.RESIDUAL)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(uniforms(seeds[order], positions[order], Purpose.RESIDUAL), whole[order])
    for row, column in itertools.product(range(4), range(3)):
        alone = uniforms(seeds[row : row + 1], positions[row : row + 1, column : column + 1], Purpose.RESIDUAL)
        assert alone.item() == whole[row, column].item()


def test_the_stream_is_pinned() -> None:
    """Results of a seed stay what they are from release to release; the twin is Python's unbounded integers."""
    increment, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    def twin(seed: int, position: int, purpose: int, lane: int) -> float:
        stream = (purpose * increment + lane * 0xBF58476D1CE4E5B9) & mask
        key = mix(mix((seed + increment) & mask) ^ stream)
        return ((mix(mix((key + position * increment) & mask)) >> 12) + 0.5) / 2**52

    for seed, position, lane in ((0, 0, 0), (1, 17, 0), (-3, 40_000, 2), (2**63 - 1, 5, 1)):
        u = uniforms(torch.tensor([seed]), torch.tensor([[position]]), Purpose.DRAFT, lane)
        assert u.item() == twin(seed, position, int(Purpose.DRAFT), lane)
    assert uniforms(torch.tensor([1]), torch.tensor([[2]]), Purpose.ACCEPT).item() == pytest.approx(PINNED, abs=1e-15)


PINNED = 0.13994968022883614


def test_wrong_shapes_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        uniforms(torch.tensor([1.0]), torch.tensor([[1]]), Purpose.ACCEPT)
    with pytest.raises(ValueError, match="positions must be"):
        uniforms(torch.tensor([1, 2]), torch.tensor([[1]]), Purpose.ACCEPT)


@pytest.mark.parametrize("size", [1, 2, 5, 256, 257, 1000])
def test_inverse_cdf_equals_the_plain_running_sum(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(300, size, generator=generator) * (torch.rand(300, size, generator=generator) > 0.6)
    weights[:, size // 2] += 0.1
    u = torch.rand(300, generator=generator, dtype=torch.float64)
    running = weights.double().cumsum(1)
    expected = (running <= u[:, None] * running[:, -1:]).sum(1)
    drawn = inverse_cdf(weights, u)
    assert torch.equal(drawn, expected)
    assert bool((weights.gather(1, drawn[:, None]) > 0).all())


def test_inverse_cdf_never_returns_a_weightless_column() -> None:
    weights = torch.zeros(4, 600)
    weights[0, 3] = weights[1, 599] = weights[2, 0] = 1.0
    weights[3, [10, 300]] = torch.tensor([1e-30, 1.0])
    for u in (2.0**-53, 0.5, 1 - 2.0**-53):
        assert inverse_cdf(weights, torch.full((4,), u, dtype=torch.float64)).tolist() == [3, 599, 0, 300]
    ends = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.0]])
    assert inverse_cdf(ends, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 3
    assert inverse_cdf(ends, torch.tensor([2.0**-53], dtype=torch.float64)).item() == 1


def test_inverse_cdf_of_log_weights_takes_minus_infinity_and_any_scale() -> None:
    weights = torch.tensor([[0.0, 2.0, 1.0, 0.0, 5.0]]).repeat(400, 1)
    u = uniforms(torch.arange(400), torch.zeros(400, 1, dtype=torch.int64), Purpose.DRAFT)[:, 0]
    expected = inverse_cdf(weights, u)
    assert torch.equal(inverse_cdf_log(weights.log() - 500.0, u), expected)
    assert torch.equal(inverse_cdf_log(weights.log() + 500.0, u), expected)


def test_inverse_cdf_draws_the_law_in_any_batch() -> None:
    weights = torch.tensor([5.0, 0.0, 1.0, 3.0, 1.0])
    u = uniforms(torch.arange(50_000), torch.zeros(50_000, 1, dtype=torch.int64), Purpose.DRAFT)[:, 0]
    drawn = inverse_cdf(weights.expand(50_000, -1), u)
    assert p_value(drawn.bincount(minlength=5), weights / 10) > LEVEL
    assert p_value(drawn.bincount(minlength=5), torch.tensor([0.52, 0.0, 0.1, 0.28, 0.1])) < LEVEL
    assert torch.equal(inverse_cdf(weights.expand(7, -1), u[100:107]), drawn[100:107])


def test_a_coin_may_not_be_tossed_twice() -> None:
    """Why rounds own their draws: block verification with uniforms keyed by token position is not lossless.

    V = 2, k = 2, three tokens, 200,000 requests. With `round_keys` the law of the text is the target's; with the
    token's own position as the key, uniforms that rejected in one round are used again in the next.
    """
    errors = {}
    for name in ("round", "position"):
        counts = _texts_of_rounds(name, requests=200_000)
        errors[name] = 0.5 * (counts - _three_token_law()).abs().sum().item()
    assert errors["round"] < 0.006, errors  # the noise of 200,000 samples in 8 cells is about 0.002
    assert errors["position"] > 0.012, errors


_FIRST_ROW, _OTHER_ROW = torch.tensor([0.3, 0.7]), torch.tensor([0.8, 0.2])  # target after token 0 and after token 1
_DRAFTED = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # q after token 0 and after token 1


def _target(last: torch.Tensor) -> torch.Tensor:
    return torch.where(last[:, None] == 0, _FIRST_ROW, _OTHER_ROW)


def _three_token_law() -> torch.Tensor:
    p = torch.stack([_FIRST_ROW, _OTHER_ROW])
    return torch.stack([p[0, a] * p[a, b] * p[b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])


def _texts_of_rounds(keyed_by: str, requests: int) -> torch.Tensor:
    """Relative frequency of the 8 texts of three tokens, by rounds of block verification with two drafts."""
    from forerun.acceptance.chain import verify

    seeds = torch.arange(requests) * 7919
    texts, lengths = torch.zeros(requests, 9, dtype=torch.int64), torch.zeros(requests, dtype=torch.int64)
    while int(lengths.min()) < 3:
        last = torch.where(lengths > 0, texts.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0], 0)
        keys = round_keys(lengths, 3) if keyed_by == "round" else lengths[:, None] + torch.arange(3)
        dice = uniforms(seeds, keys[:, :2], Purpose.DRAFT)
        first = (dice[:, 0] >= _DRAFTED[last, 0].double()).long()
        second = (dice[:, 1] >= _DRAFTED[first, 0].double()).long()
        q = torch.stack([_DRAFTED[last], _DRAFTED[first]], dim=1).log()
        p = torch.stack([_target(last), _target(first), _target(second)], dim=1).log()
        draft = Draft(torch.stack([first, second], dim=1), torch.full((requests,), 2), q)
        accept = uniforms(seeds, keys[:, :2], Purpose.ACCEPT)
        residual = uniforms(seeds, keys[:, :1], Purpose.RESIDUAL)[:, 0]
        verdict = verify("block", VerifyInput(p, draft, torch.ones(requests), accept, residual))
        for j in range(3):
            live = (verdict.accepted >= j) & (lengths < 3)
            texts[live, lengths[live]] = verdict.tokens[live, j]
            lengths += live.long()
    code = texts[:, 0] * 4 + texts[:, 1] * 2 + texts[:, 2]
    return torch.bincount(code, minlength=8).float() / requests
