"""Masks of truncated sampling against their definition, one row at a time."""

from __future__ import annotations

import pytest
import torch

from forerun.acceptance.truncate import Truncation, truncate
from forerun.errors import UserError
from proofs.references import reference_truncate

CUTS = [
    Truncation(top_k=1), Truncation(top_k=5), Truncation(top_k=99), Truncation(top_p=0.01), Truncation(top_p=0.6),
    Truncation(min_p=0.2), Truncation(min_p=1.0), Truncation(7, 0.8, 0.05),
]  # fmt: skip


@pytest.mark.parametrize("cuts", CUTS)
def test_rows_are_those_of_the_definition(cuts: Truncation) -> None:
    source = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(20, 5, 31, generator=source)  # more rows than are sorted at once
    temperature = torch.rand(20, generator=source) + 0.5
    processed = (truncate(logits, temperature, cuts).double() / temperature[:, None, None]).softmax(-1)
    expected = [
        [reference_truncate(row.tolist(), float(t), cuts) for row in rows]
        for rows, t in zip(logits, temperature, strict=True)
    ]
    torch.testing.assert_close(processed, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert int((processed == 0).sum()) > 0 or cuts.top_k == 99


def test_masked_tokens_stay_masked_and_greedy_rows_keep_their_argmax() -> None:
    logits = torch.tensor([[[2.0, -torch.inf, 1.0, 0.0]], [[0.0, 3.0, 1.0, 2.0]]])
    out = truncate(logits, torch.tensor([1.0, 0.0]), Truncation(top_p=0.5))
    assert out[0, 0].isinf().tolist() == [False, True, True, True]
    assert int(out[1, 0].argmax()) == 1 and not bool(out[1, 0, 1].isinf())


def test_nothing_is_copied_where_nothing_is_cut() -> None:
    logits = torch.randn(2, 3, 5)
    assert truncate(logits, torch.ones(2), Truncation()) is logits


@pytest.mark.parametrize("wrong", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 2.0}])
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
        Truncation(**wrong)  # type: ignore[arg-type]
