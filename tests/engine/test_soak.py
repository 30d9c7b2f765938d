"""The soak of benchmarks/soak.py, shorter, and that it sees what it looks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.soak import PROMPTS, SAMPLES, Watch, made_up, soak
from forerun.engine import Counters, Sampling
from forerun.training.prompts import Request
from forerun.training.rollout import RolloutBatch
from forerun.types import Rollout


@pytest.mark.slow
def test_replicas_that_fail_at_random_lose_nothing() -> None:
    """About eight failures in 200 steps of 32 samples; one in which all replicas were lucky has odds of 1 in 1,000."""
    result = soak(steps=200, replicas=4, lag=2, failures=0.0012)
    assert result["wrong"] == [] and 1 <= result["lost"] <= 25 and result["warnings"] >= result["lost"]


def generated(step: int) -> list[Rollout]:
    rollouts = []
    for p in range(PROMPTS):
        for s in range(SAMPLES):
            tokens = made_up(step, p, s)
            rollouts.append(Rollout([1], tokens, [-1.0] * len(tokens), [step] * len(tokens), "length", p, s))
    return rollouts


def look(rollouts: list[Rollout], step: int = 5) -> list[str]:
    watch = Watch(lag=2)
    watch.look(step, RolloutBatch(rollouts, [], torch.zeros(1), 0.0, 0.0, Counters(), [], Request([], [], Sampling())))
    return watch.wrong


def test_the_watch_sees_lost_doubled_altered_and_stale_samples() -> None:
    whole = generated(5)
    assert look(whole) == []
    assert "has the samples" in look(whole[1:])[0]
    assert "has the samples" in look([*whole, whole[0]])[0]
    assert "another seed" in look([replace(whole[0], tokens=[0, *whole[0].tokens]), *whole[1:]])[0]
    assert "versions" in look([replace(whole[0], versions=[2] * len(whole[0].tokens)), *whole[1:]])[0]
    assert look([replace(whole[0], versions=[3] * len(whole[0].tokens)), *whole[1:]]) == []


def test_the_watch_sees_growth() -> None:
    flat = [(step, 500.0 + step % 3, 5, 40) for step in range(1000)]
    watch = Watch(2, measured=list(flat))
    assert watch.result()["wrong"] == []
    watch.measured = [(s, mib + s * 0.02, threads, files) for s, mib, threads, files in flat]
    assert "memory grows by 20.0 MiB" in watch.result()["wrong"][0]
    watch.measured = [(s, mib, threads + s // 300, files + s // 100) for s, mib, threads, files in flat]
    assert [w.split(" grew")[0] for w in watch.result()["wrong"]] == ["threads", "open files"]
