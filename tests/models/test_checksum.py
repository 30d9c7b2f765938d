"""The checksum of weights sees whatever is not the same, wherever and in whatever pieces it is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forerun.errors import UserError
from forerun.models.checksum import COLUMNS, checksum, weighted_sum
from forerun.workers.weights import Piece, Staging, chunks, shapes

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8]


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    source = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=source) * 50).to(dtype)


def swapped(values: Tensor, one: int, other: int) -> Tensor:
    result = values.clone().view(-1)
    result[one], result[other] = values.view(-1)[other].clone(), values.view(-1)[one].clone()
    return result.view(values.shape)


CHANGES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "rows permuted": ((64, 48), lambda x: x[torch.randperm(64, generator=torch.Generator().manual_seed(0))]),
    "columns permuted": ((64, 48), lambda x: x[:, torch.randperm(48, generator=torch.Generator().manual_seed(0))]),
    "two rows exchanged": ((64, 48), lambda x: x[[1, 0, *range(2, 64)]]),
    "rows of a whole checksum row": ((6, 4 * COLUMNS), lambda x: x[[0, 1, 2, 3, 5, 4]]),
    "experts permuted": ((4, 3, 5), lambda x: x[[2, 0, 3, 1]]),
    "experts exchanged": ((8, 64, 64), lambda x: x[[0, 1, 2, 3, 4, 5, 7, 6]]),
    "halves exchanged": ((64, 48), lambda x: torch.cat([x[32:], x[:32]])),
    "transposed": ((48, 48), lambda x: x.T.contiguous()),
    "reversed": ((7, 11), lambda x: x.flip(0, 1)),
    "neighbours exchanged": ((64, 48), lambda x: swapped(x, 100, 101)),
    "one column's elements exchanged": ((64, 48), lambda x: swapped(x, 5, 5 + 48)),
    "last two of an odd size": ((3, 5), lambda x: swapped(x, 13, 14)),
    "far apart": ((500, 100), lambda x: swapped(x, 0, 49_999)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_elements_in_other_places_have_another_checksum(change: str, dtype: torch.dtype) -> None:
    shape, move = CHANGES[change]
    before = weights(shape, dtype)
    after = move(before)
    assert not torch.equal(before, after)
    assert checksum({"w": before}) != checksum({"w": after})


def test_every_exchange_of_a_zero_with_its_negative_shows() -> None:
    """The sign of the topmost number of a word is the bit that products modulo 2^64 forget first."""
    seen = {checksum({"w": torch.zeros(64, dtype=torch.bfloat16)})}
    for place in range(64):
        values = torch.zeros(64, dtype=torch.bfloat16)
        values[place] = -0.0
        seen.add(checksum({"w": values}))
    assert len(seen) == 65


def test_every_single_bit_shows() -> None:
    values = torch.zeros(COLUMNS + 3, dtype=torch.int64)
    seen = {checksum({"w": values})}
    for place in (0, 1, COLUMNS - 1, COLUMNS, COLUMNS + 2):
        for bit in range(64):
            values[place] = -(2**63) if bit == 63 else 2**bit
            seen.add(checksum({"w": values}))
            values[place] = 0
    assert len(seen) == 1 + 5 * 64


def test_all_exchanges_of_two_words_show() -> None:
    """A thousand words of a few values, as zeros and small integers are: none of half a million exchanges is missed."""
    count = 1024
    values = torch.arange(count) % 7 + (torch.arange(count) % 5 << 61)
    contributions = torch.stack([_contribution(values, i) for i in range(count)])  # [place of the weight, value]
    own = contributions.diagonal()
    change = contributions + contributions.T - own[:, None] - own[None, :]
    different = values[:, None] != values[None, :]
    assert bool((change != 0)[different].all())


def _contribution(values: Tensor, place: int) -> Tensor:
    """What each of the values would add to the sum at a place, which has the weight that a 1 there shows."""
    one = torch.zeros(len(values), dtype=torch.int64)
    one[place] = 1
    return (values + (values >> 32)) * _signed(weighted_sum(one))


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def test_payloads_of_nan_show() -> None:
    bits = torch.tensor([0x7FC0, 0x7FC1, 0x7F81, -64], dtype=torch.int16)
    assert len({checksum({"w": b.view(torch.bfloat16).view(1)}) for b in bits}) == 4


def test_names_shapes_and_types_show() -> None:
    values = torch.zeros(4, 6)
    states = [
        {"a": values}, {"b": values}, {"a": values.view(6, 4)}, {"a": values.view(-1)}, {"a": torch.zeros(4, 7)},
        {"a": values.to(torch.int32)}, {"a": values.half()}, {"a": values, "b": values}, {"a": torch.zeros(0)}, {},
    ]  # fmt: skip
    assert len({checksum(state) for state in states}) == len(states)


def test_tensors_that_change_names_show_and_their_order_does_not() -> None:
    a, b = weights((8, 8)), weights((8, 8)) + 1
    assert checksum({"a": a, "b": b}) == checksum({"b": b, "a": a}) != checksum({"a": b, "b": a})
    assert checksum({"a": a, "b": a}) != checksum({"a": b, "b": b})


@pytest.mark.parametrize("size", [1, 7, 4 * COLUMNS, 4 * COLUMNS + 1, 100_003])
def test_it_is_the_same_for_blocks_of_any_size_and_for_views(size: int) -> None:
    values = weights((size,))
    found = {weighted_sum(values, rows) for rows in (1, 2, 3, 16, 4096)}
    shifted = torch.cat([values[:1], values])[1:]  # not on a boundary of words
    strided = torch.stack([values, values], dim=1)[:, 0]
    assert found | {weighted_sum(shifted), weighted_sum(strided)} == {weighted_sum(values)}


@pytest.mark.parametrize("size_bytes", [1, 7, 64, 1000, 10**6])
def test_pieces_of_any_size_come_together_to_it(size_bytes: int) -> None:
    group = {"a": weights((31, 33)), "b": weights((5,), torch.float32)}
    staging = Staging.of({"policy": shapes(group)})
    for pieces in chunks({"policy": group}, size_bytes):
        staging.add(pieces)
    staging.check({"policy": checksum(group)})


def test_pieces_that_change_places_on_the_way_are_refused() -> None:
    values = weights((64, 48))
    half = values.numel() // 2
    staging = Staging.of({"policy": shapes({"w": values})})
    flat = values.view(-1)
    staging.add([Piece("policy", "w", 0, flat[half:]), Piece("policy", "w", half, flat[:half])])
    with pytest.raises(UserError, match="damaged"):
        staging.check({"policy": checksum({"w": values})})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_same_on_a_gpu(dtype: torch.dtype) -> None:
    values = weights((301, 1003), dtype)
    assert checksum({"w": values}) == checksum({"w": values.cuda()})
