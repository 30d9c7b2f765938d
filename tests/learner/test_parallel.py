"""Two ranks make the update of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from forerun.config import TrainConfig
from forerun.learner import parallel
from forerun.learner.forward import completion_logits, microbatches, token_batch, token_logprobs
from forerun.learner.losses import clipped_policy_loss
from forerun.learner.optimizer import MasterOptimizer
from forerun.learner.parallel import split_rows, sum_gradients, sum_over_ranks
from forerun.models import load_policy

LENGTHS = [(3, 30), (5, 4), (2, 17), (6, 9), (4, 25)]  # prompt and completion tokens
ADVANTAGES = [1.0, -0.5, 0.7, -1.2, 0.4]


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


def update(folder: str, rows: list[int], share: bool, local: bool) -> tuple[float, list[Any], list[torch.Tensor]]:
    """Loss of the batch, gradients and weights after a step, from these rows; `share`: with the other rank.

    `local` is the fault that the comparison must catch: every rank divides by its own tokens, and the mean is taken.
    """
    source = torch.Generator().manual_seed(1)
    policy = load_policy(folder, "float32", "cpu")
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = MasterOptimizer([*policy.model.parameters(), unused], TrainConfig(weight_decay=0.1))
    drawn = [torch.randint(1, 50, (p + c,), generator=source).tolist() for p, c in LENGTHS]
    pairs = [(ids[:p], ids[p:]) for ids, (p, _) in zip(drawn, LENGTHS, strict=True)]
    size = float(sum(LENGTHS[i][1] for i in rows))
    if share:
        size = 2 * size if local else sum_over_ranks([size])[0]
    total = 0.0
    for group in microbatches([sum(LENGTHS[i]) for i in rows], 40):
        batch = token_batch([pairs[rows[j]] for j in group], policy.device)
        logprobs = token_logprobs(completion_logits(policy.model, batch), batch.targets, 1.0)
        advantages = torch.cat([torch.full((LENGTHS[rows[j]][1],), ADVANTAGES[rows[j]]) for j in group])
        terms = clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2, torch.ones_like(logprobs))
        loss = terms.loss.sum() / size
        loss.backward()
        total += float(loss.detach())
    if share:
        total = sum_over_ranks([total])[0]
        sum_gradients(optimizer.masters)
    gradients = [None if m.grad is None else m.grad.clone() for m in optimizer.masters]
    optimizer.step(1e-2)
    return total, gradients, [m.detach() for m in optimizer.masters]


CASES = {  # rows of each rank, whether normalisers are local
    "balanced": (split_rows([sum(x) for x in LENGTHS], 2), False),
    "one rank idle": ([[0, 1, 2, 3, 4], []], False),
    "local normalisers": ([[0, 4], [1, 2, 3]], True),
}


def work(rank: int, folder: str, meeting: str) -> None:
    torch.set_num_threads(1)
    parallel.BUCKET = 3000  # several messages
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = {name: update(folder, split[rank], True, local) for name, (split, local) in CASES.items()}
    torch.save(found, f"{meeting}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_make_the_update_of_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """float32: loss within 1e-5, gradients within 1e-5 of the largest; the ranks' weights are bit-equal."""
    folder, meeting = str(tiny("llama")), str(tmp_path / "meeting")
    mp.spawn(work, args=(folder, meeting), nprocs=2)
    ranks = [torch.load(f"{meeting}.{rank}") for rank in range(2)]
    loss, gradients, weights = update(folder, list(range(5)), False, False)
    largest = max(float(g.abs().max()) for g in gradients[:-1])
    assert largest > 1e-2 and gradients[-1] is None and torch.equal(weights[-1], torch.ones(3))
    for case in CASES:
        (mine, own, updated), (theirs, others, elsewhere) = ranks[0][case], ranks[1][case]
        assert mine == theirs and own[-1] is None and others[-1] is None
        assert all(torch.equal(x, y) for x, y in zip(updated, elsewhere, strict=True))
        error = max(float((x - y).abs().max()) for x, y in zip(own[:-1], gradients[:-1], strict=True))
        if case == "local normalisers":
            assert error > 1e-2 * largest, "the comparison misses a wrong normaliser"
        else:
            assert error < 1e-5 * largest and mine == pytest.approx(loss, abs=1e-5)
