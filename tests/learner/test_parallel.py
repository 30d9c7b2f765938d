"""How rows are given out; what ranks make of them is in test_distributed.py."""

from __future__ import annotations

import torch

from forerun.learner.parallel import split_rows


def test_rows_are_split_by_tokens() -> None:
    lengths = [9, 2, 7, 7, 3, 2, 8]
    rows = split_rows(lengths, 2)
    assert sorted(i for part in rows for i in part) == list(range(7))
    assert rows == split_rows(lengths, 2) and sorted(sum(lengths[i] for i in part) for part in rows) == [18, 20]
    assert split_rows(lengths, 1) == [list(range(7))]
    assert split_rows([4], 3) == [[0], [], []] and split_rows([], 2) == [[], []]
    source = torch.Generator().manual_seed(0)
    many = torch.randint(30, 2000, (64,), generator=source).tolist()
    loads = [sum(many[i] for i in part) for part in split_rows(many, 8)]
    alternating = [sum(many[r::8]) for r in range(8)]
    assert max(loads) < 1.02 * sum(many) / 8 < 1.1 * sum(many) / 8 < max(alternating)
