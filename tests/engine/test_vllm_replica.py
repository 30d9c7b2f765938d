"""vLLM in a process of its own, killed and hung in the middle of its work. Skipped where vLLM is not installed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from forerun.config import SpeculationConfig
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.engine.replicated import ReplicatedEngine
from forerun.models import Policy
from forerun.types import Rollout
from forerun.workers.handle import Timeouts
from vllm_tiny import PROMPTS, changed, needs_vllm, version

pytestmark = [needs_vllm, pytest.mark.slow]
N = 4
GREEDY = Sampling(40, 0.0, 3, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(small: Policy, drafter: Eagle3Drafter) -> Iterator[ReplicatedEngine]:
    block = SpeculationConfig.model_validate({"method": "eagle3", "draft": "given", "k": 3})
    timeouts = Timeouts(heartbeat_s=20.0, start_s=300.0)
    made = ReplicatedEngine("vllm", small, drafter, block, slots=4, replicas=1, timeouts=timeouts)
    yield made
    made.close()


def by_place(rollouts: list[Rollout]) -> dict[tuple[int, int], list[int]]:
    found = {(r.prompt_index, r.sample_index): r.tokens for r in rollouts}
    assert len(found) == len(rollouts) == len(PROMPTS) * N
    return found


@pytest.mark.parametrize(("how", "reason"), [(signal.SIGKILL, "killed by signal 9"), (signal.SIGSTOP, "silent")])
def test_a_lost_vllm_is_replaced_and_every_sample_comes_once(
    engine: ReplicatedEngine, small: Policy, drafter: Eagle3Drafter, how: signal.Signals, reason: str
) -> None:
    """Its successor is brought to the current policy and drafter: the texts are those of the changed policy."""
    engine.warnings.clear()
    lost, rerun = engine.lost, engine.rerun
    other = changed(small, 0.3, seed=1)
    number = engine.metrics()["version"] + 1
    engine.load(version(number, other, drafter))
    stream = engine.stream(PROMPTS, GREEDY, N)
    found = [next(stream)]
    os.kill(engine.pids[0], how)
    found += list(stream)
    wanted, stale = (list(LocalEngine(p, slots=8).stream(PROMPTS, GREEDY, N)) for p in (other, small))
    assert by_place(found) == by_place(wanted) != by_place(stale)
    assert {v for r in found for v in r.versions} == {number}
    assert engine.lost == lost + 1 and 0 < engine.rerun - rerun < len(PROMPTS) * N
    assert len(engine.warnings) == 1 and reason in engine.warnings[0]
