"""Counter-based uniforms, and one token drawn from a row by its inverse distribution function.

A uniform is a hash of (request seed, absolute position, purpose, lane). It does not depend on the batch, the order of
the draws or the device, and streams of different purpose are independent: acceptance never reuses the numbers that
sampled the draft. Speculative and plain decoding of one seed give the same distribution, not the same text.

Conventions: B requests, n positions, V columns; uniforms are float64 in the open interval (0, 1).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as int64: splitmix64's counter step
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # its two multipliers
_MANTISSA_BITS = 52
_SLOTS = 128  # draws that one round may key under its starting position
_BLOCK = 256  # columns per partial sum


class Purpose(IntEnum):
    """What a uniform is for. Members are streams; the numbers are part of every result, so never renumber them."""

    DRAFT = 1  # sampling a draft token
    ACCEPT = 2  # accepting or rejecting a draft token
    RESIDUAL = 3  # the token that ends a round: residual or bonus
    PLAIN = 4  # decoding without speculation
    BRANCH = 5  # which children a draft tree keeps


def uniforms(seeds: Tensor, positions: Tensor, purpose: Purpose, lane: int = 0) -> Tensor:
    """Return one float64 uniform in (0, 1) per position.

    `seeds` is [B] int64 (any value), `positions` [B, n] int64; `lane` numbers parallel draws of one purpose at one
    position, such as the siblings of a tree. The result is [B, n]. Source: Steele, Lea and Flood 2014 (splitmix64).
    """
    if seeds.dtype != torch.int64 or positions.dtype != torch.int64:
        raise ValueError(f"seeds and positions must be int64; they are {seeds.dtype} and {positions.dtype}")
    if positions.dim() != 2 or seeds.shape != positions.shape[:1]:
        raise ValueError(f"positions must be [B, n] for seeds [B]; shapes are {positions.shape} and {seeds.shape}")
    # The key hashes the seed before the stream number enters, so neighbouring seeds cannot be neighbouring streams;
    # the counter is then hashed twice because adjacent positions differ in few bits.
    stream = _signed(int(purpose) * INCREMENT + lane * _FIRST)
    key = mix_bits(mix_bits(seeds + INCREMENT) ^ stream)  # [B]
    bits = mix_bits(mix_bits(key[:, None] + positions * INCREMENT))  # [B, n]
    high = _shift_right(bits, 64 - _MANTISSA_BITS)
    return (high.to(torch.float64) + 0.5) * 2.0**-_MANTISSA_BITS  # exact: never 0, never 1


def round_keys(starts: Tensor, slots: int) -> Tensor:
    """Positions for the `uniforms` of a round that starts at `starts` [B]: one per draft slot, [B, slots].

    A round owns its draws. Block verification reads every uniform of a round, also behind the first rejection; keyed by
    the token's own position, such a uniform would be used again in the next round, conditioned on having rejected.

    Raises:
        ValueError: more slots than a round can key; they would collide with those of the next position.
    """
    if slots > _SLOTS:
        raise ValueError(f"a round can key {_SLOTS} slots, but {slots} were asked for; draft fewer tokens")
    return starts[:, None] * _SLOTS + torch.arange(slots, device=starts.device)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Draw one column per row with probability proportional to its weight: the first whose running sum exceeds u.

    `weights` is [B, V], non-negative and not necessarily normalised, each row with some positive entry; `u` is [B]
    float64 in (0, 1). The result is [B] int64, non-decreasing in u, and never a column of zero weight.
    """
    # Two levels, blocks and then columns of one block: float64 running sums over all of V would cost ten times as much.
    width = min(_BLOCK, weights.shape[1])
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % width)).unflatten(1, (-1, width))
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, blocks]
    goal = u * sums[:, -1]
    block = _first_above(sums, goal)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = blocks[torch.arange(len(u), device=u.device), block].to(torch.float64).cumsum(-1)  # [B, width]
    return block * width + _first_above(inside, goal - before)


def inverse_cdf_log(log_weights: Tensor, u: Tensor) -> Tensor:
    """Draw as `inverse_cdf` from log-weights [B, V]; rows may hold -inf but not only -inf."""
    return inverse_cdf(torch.exp(log_weights - log_weights.amax(-1, keepdim=True)), u)


def mix_bits(bits: Tensor) -> Tensor:
    """The 64-bit finaliser of splitmix64 (Stafford's thirteenth variant), a bijection."""
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_SECOND)
    return bits ^ _shift_right(bits, 31)


def _signed(value: int) -> int:
    """The int64 that has the lowest 64 bits of a Python integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _first_above(cumulative: Tensor, goal: Tensor) -> Tensor:
    """First column of [B, n] whose running sum is above the goal [B], at most the last one that added anything."""
    # Rounding can put the goal at or above the total; the column where the total is first reached has positive weight.
    above = (cumulative <= goal[:, None]).sum(-1)
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(above, last)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Logical shift: int64 `>>` copies the sign bit downward, the mask takes the copies away."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
