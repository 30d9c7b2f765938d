"""Attention of training-time test in blocks, against all scores at once and against one query at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from forerun.drafters import unroll
from forerun.drafters.unroll import attend_directly, unrolled_attention

N, HEADS, GROUPS, D, LENGTH, FIRST, BASES = 2, 4, 2, 8, 40, 5, 31
KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "scaled": {"scale": 0.3}, "softcapped": {"softcap": 2.0}, "windowed": {"window": 9},
    "window within a block": {"window": 2}, "both": {"window": 12, "softcap": 1.5},
}  # fmt: skip


def inputs(passes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, keys and values of the text, keys and values of each later pass."""
    source = torch.Generator().manual_seed(passes)
    shapes = [(HEADS, BASES), (GROUPS, LENGTH), (GROUPS, LENGTH), *[(GROUPS, BASES)] * (2 * passes)]
    made = [torch.randn(N, *shape, D, generator=source, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def result(attend: Callable[..., Tensor], tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Output, and the gradients of a function of it."""
    query, keys, values, *rest = tensors
    own = list(zip(rest[::2], rest[1::2], strict=True))
    out = attend(query, (keys, values), own, FIRST, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)]


def one_by_one(
    query: Tensor, context: Any, own: Any, first: int, scale: float = D**-0.5, window: int = 99, softcap: float = 0.0
) -> Tensor:
    """Softmax over the keys that a query sees, in a loop."""
    out = torch.zeros(N, BASES, HEADS, D, dtype=query.dtype)
    for n in range(N):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            for t in range(BASES):
                position = first + t + len(own)
                seen = [(i, *(x[n, group, i] for x in context)) for i in range(first + t + 1)]
                seen += [(first + t + 1 + r, k[n, group, t], v[n, group, t]) for r, (k, v) in enumerate(own)]
                seen = [entry for entry in seen if entry[0] > position - window]
                scores = torch.stack([query[n, head, t] @ key for _, key, _ in seen]) * scale
                scores = torch.tanh(scores / softcap) * softcap if softcap else scores
                out[n, t, head] = scores.softmax(0) @ torch.stack([value for _, _, value in seen])
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_blocks_of_queries_give_the_values_and_gradients_of_all_at_once(
    passes: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = result(attend_directly, inputs(passes), KINDS[kind])
    for rows in (1, 4, 30):
        monkeypatch.setitem(unroll.SCORE_BYTES, "cpu", 4 * N * HEADS * (LENGTH + passes) * rows)
        for ours, theirs in zip(result(unrolled_attention, inputs(passes), KINDS[kind]), whole, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "windowed", "both"])
def test_they_are_those_of_a_loop(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unroll.SCORE_BYTES, "cpu", 4 * N * HEADS * (LENGTH + 2) * 6)
    slow = result(one_by_one, inputs(2, torch.float64), KINDS[kind])
    for ours, theirs in zip(result(unrolled_attention, inputs(2, torch.float64), KINDS[kind]), slow, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("length", [2048, 4096])
def test_what_is_kept_for_the_backward_pass_grows_with_the_length_alone(length: int) -> None:
    """At most the tensors that go in and out, and no scores, which would be `length` times as many."""
    query, key, value, own = (torch.randn(1, 8, length, 4, requires_grad=True) for _ in range(4))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = unrolled_attention(query, (key, value), [(own, own)], 0)
    assert sum(kept.values()) <= 6 * out.numel() * 4
