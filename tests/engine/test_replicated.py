"""Engines in worker processes, under real kills, hangs and invalid output: every sample comes once, of its version."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import faulty_engines
from forerun.config import SpeculationConfig
from forerun.drafters.ngram import NgramDrafter
from forerun.engine import Sampling, Weights
from forerun.engine.local.engine import LocalEngine
from forerun.engine.replicated import ReplicasLost, ReplicatedEngine
from forerun.engine.stream import Stream
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.training.restart import Restarts
from forerun.training.weights import pack_weights
from forerun.types import Rollout
from forerun.workers.handle import Timeouts

pytestmark = pytest.mark.usefixtures("forked_workers")
PROMPTS = [[5, 6, 7], [9, 3], [3, 4, 5, 6, 7, 8], [20, 21], [30] * 10]
LONG = Sampling(48, 1.0, 3, ignore_eos=True)
N = 4
GREEDY = replace(LONG, temperature=0.0)
HASTY = Timeouts(heartbeat_s=8.0, start_s=120.0)


@pytest.fixture(scope="module", autouse=True)
def makers() -> Iterator[None]:
    """The replicas find `faulty_engines.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(faulty_engines.__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama")), "float32", "cpu")


def block() -> SpeculationConfig:
    return SpeculationConfig.model_validate({"method": "ngram", "k": 3, "ngram": {"prompt_lookup_min": 1}})


def drafter() -> NgramDrafter:
    return NgramDrafter(block().ngram)


def start(policy: Policy, replicas: int, make: str, losses: int | None = None, slots: int = 4) -> ReplicatedEngine:
    return ReplicatedEngine(
        "local",
        policy,
        drafter(),
        block(),
        slots=slots,
        replicas=replicas,
        timeouts=HASTY,
        make=make,
        losses=losses,
    )


@pytest.fixture(scope="module")
def shared(small: Policy) -> Iterator[ReplicatedEngine]:
    """Two replicas with a pause before each round, so that something can happen to them."""
    engine = start(small, 2, "faulty_engines:slow")
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: ReplicatedEngine, small: Policy) -> ReplicatedEngine:
    """The same, with the first weights and no history, whatever a test before did to it."""
    shared.load(pack_weights(0, small, drafter(), shared=False))
    shared.warnings.clear()
    shared.lost = shared.rerun = 0
    return shared


def changed(policy: Policy) -> Policy:
    """Another policy of the same shape."""
    other = load_policy(policy.name, "float32", "cpu")
    torch.manual_seed(1)
    for parameter in other.model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return other


def expected(policy: Policy, sampling: Sampling) -> dict[tuple[int, int], list[int]]:
    """The texts of one process without speculation; greedy texts do not depend on how they were batched."""
    return by_place(LocalEngine(policy, slots=4).stream(PROMPTS, sampling, N))


def by_place(rollouts: Any) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for rollout in rollouts:
        assert (rollout.prompt_index, rollout.sample_index) not in found
        found[rollout.prompt_index, rollout.sample_index] = rollout.tokens
    return found


def test_texts_are_those_of_one_process(engine: ReplicatedEngine, small: Policy) -> None:
    before = engine.counters.copy()
    assert by_place(engine.stream(PROMPTS, GREEDY, N)) == expected(small, GREEDY)
    metrics, counted = engine.metrics(), engine.counters.minus(before)
    assert counted.tokens == len(PROMPTS) * N * 48 and 0 < counted.rounds < counted.tokens and counted.seconds > 0
    replicas = metrics["replicas"]
    assert {k: replicas[k] for k in ("count", "lost", "samples_rerun")} == {"count": 2, "lost": 0, "samples_rerun": 0}
    assert replicas["slowest_ratio"] >= 1 and not engine.warnings


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, "killed by signal 9"),
        pytest.param(signal.SIGSTOP, "silent", marks=pytest.mark.slow),
    ],
)
def test_a_replica_lost_in_a_stream_is_replaced_and_every_sample_comes_once(
    engine: ReplicatedEngine, small: Policy, how: signal.Signals, words: str
) -> None:
    """The successor has the current version, too."""
    other = changed(small)
    engine.load(pack_weights(7, other, drafter(), shared=False))
    stream = engine.stream(PROMPTS, GREEDY, N)
    found = [next(stream)]
    os.kill(engine.pids[1], how)
    found += list(stream)
    assert by_place(found) == expected(other, GREEDY) != expected(small, GREEDY)
    assert {v for r in found for v in r.versions} == {7}
    assert engine.metrics()["replicas"]["lost"] == 1
    assert 0 < engine.metrics()["replicas"]["samples_rerun"] <= 2 * N
    assert len(engine.warnings) == 1 and "Replica 1" in engine.warnings[0] and words in engine.warnings[0]


@pytest.mark.parametrize("replicas", [4, 16, 24, 32, 64])
@pytest.mark.parametrize("slots", [4, 32])
def test_every_replica_has_work_and_few_prompts_are_split(replicas: int, slots: int) -> None:
    """8 prompts of 8 samples: by prompt number, 8 replicas would work and the others wait."""
    stream = Stream.opened([[1]] * 8, LONG, 8, None, replicas, 0)
    given = stream.hand_out(slots)
    loads = [len(pending) for pending in stream.pending]
    assert min(loads) >= 1 and {place for requests in given.values() for place in requests} == set().union(
        *stream.pending
    )
    assert max(loads) - min(loads) <= (1 if slots == 32 else slots)
    prefills = sum(len({prompt for prompt, _ in pending}) for pending in stream.pending)
    assert prefills <= max(8, replicas)
    assert stream.unfinished == 64 and stream.waiting == 64 - sum(loads)


def test_samples_go_to_the_replica_that_is_free_and_stay_with_their_prompt() -> None:
    """Replica 1 is three times as fast; neither waits while samples are left, and hardly a prompt is split."""
    stream = Stream.opened([[1]] * 40, LONG, 8, None, 2, 0)
    prompts: list[set[int]] = [set(), set()]
    for tick in range(400):
        for replica, requests in stream.hand_out(8).items():
            prompts[replica] |= {prompt for prompt, _ in requests}
        for replica in [1] if tick % 3 else [0, 1]:
            assert stream.pending[replica] or not stream.waiting
            if stream.pending[replica]:
                stream.pending[replica].pop()
    assert stream.unfinished == 0
    assert stream.asked[0] + stream.asked[1] == 320 and 2.4 < stream.asked[1] / stream.asked[0] < 3.2
    assert len(prompts[0] & prompts[1]) <= 4


def test_what_a_lost_replica_has_not_delivered_is_handed_out_again() -> None:
    stream = Stream.opened(PROMPTS, LONG, N, None, 2, 0)
    stream.hand_out(32)
    kept = stream.pending[0].copy()
    lost = stream.pending[1].copy()
    assert stream.take_back(1) == len(lost) and stream.unfinished == len(PROMPTS) * N
    again = stream.hand_out(32)
    assert {place for requests in again.values() for place in requests} == lost
    assert stream.pending[0] >= kept and stream.pending[0] | stream.pending[1] == kept | lost


def test_samples_are_handed_out_as_slots_become_free(engine: ReplicatedEngine, small: Policy) -> None:
    """20 samples for 2 x 4 slots. One replica sleeps at first: the other one takes what it would have done."""
    stream = engine.stream(PROMPTS, GREEDY, N)
    found = [next(stream)]
    os.kill(engine.pids[0], signal.SIGSTOP)
    while len(found) < len(PROMPTS) * N - 8:
        found.append(next(stream))
    os.kill(engine.pids[0], signal.SIGCONT)
    assert by_place([*found, *stream]) == expected(small, GREEDY)
    assert engine.metrics()["replicas"]["lost"] == 0 and engine.metrics()["replicas"]["idle"] == 0


def test_an_engine_that_cannot_extend_its_stream_starts_another_one(small: Policy) -> None:
    with closing(start(small, 2, "faulty_engines:without_extend")) as engine:
        assert by_place(engine.stream(PROMPTS, GREEDY, N)) == expected(small, GREEDY)
        assert not engine.warnings


def test_samples_that_are_added_to_a_stream_are_those_of_one_that_had_them(small: Policy) -> None:
    """Prompts come back after they were left, and some while they wait."""
    engine = LocalEngine(small, drafter(), k=3, slots=2)
    places = [(p, s) for p in range(len(PROMPTS)) for s in range(N)]
    later = places[1::3] + places[2::3]

    def between() -> None:
        if later and engine.counters.tokens % 3 == 0:
            assert engine.extend([later.pop() for _ in range(min(3, len(later)))])

    found = by_place(engine.stream(PROMPTS, GREEDY, N, places[::3], between))
    assert not later and found == expected(small, GREEDY)


@pytest.mark.parametrize("replicas", [1, 3])
def test_samples_are_those_of_one_process_bit_for_bit(small: Policy, replicas: int) -> None:
    """With one slot, so that a sample is alone in its batch wherever it runs; drawn at T = 1, with speculation."""
    one = LocalEngine(small, drafter(), k=3, slots=1)
    wanted = {(r.prompt_index, r.sample_index): (r.tokens, r.logprobs) for r in one.stream(PROMPTS, LONG, N)}
    with closing(start(small, replicas, "faulty_engines:slow", slots=1)) as engine:
        found = {(r.prompt_index, r.sample_index): (r.tokens, r.logprobs) for r in engine.stream(PROMPTS, LONG, N)}
        assert found == wanted and engine.metrics()["replicas"]["lost"] == 0


def test_idle_replicas_are_reported_once_with_numbers(engine: ReplicatedEngine) -> None:
    for _ in range(2):
        list(engine.stream([[5, 6]], LONG, 2, [(0, 1)]))
    assert engine.metrics()["replicas"]["idle"] == 1
    assert engine.warnings == [
        "1 of 2 replicas have nothing to do: 1 samples were asked for. Set rollout.replicas=1, or raise "
        "train.prompts_per_step or train.samples_per_prompt"
    ]
    engine._warned_of_idle = False


def test_one_lost_between_streams_is_replaced_at_the_next_load(engine: ReplicatedEngine, small: Policy) -> None:
    os.kill(engine.pids[0], signal.SIGKILL)
    engine.load(pack_weights(1, small, drafter(), shared=False))
    assert engine.metrics()["replicas"]["lost"] == 1
    assert {v for r in engine.stream(PROMPTS, LONG, N) for v in r.versions} == {1}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "token": ({"tokens": [4, 10**6]}, "token id outside"),
    "lengths": ({"logprobs": [-1.0]}, "1 log-probabilities"),
    "too long": ({"tokens": [4] * 49, "logprobs": [-1.0] * 49, "versions": [0] * 49}, "49 tokens of at most 48"),
    "empty": ({"tokens": [], "logprobs": [], "versions": []}, "0 tokens"),
    "not finite": ({"logprobs": [-1.0, math.nan]}, "not finite"),
    "above 0": ({"logprobs": [-1.0, 0.7]}, "above 0"),
    "version": ({"versions": [0, 99]}, "is of versions"),
    "not asked": ({"sample_index": 3}, "not asked of it, or came twice"),
    "prompt": ({"prompt_ids": [1, 2]}, "another prompt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_invalid_output_is_seen(fault: str) -> None:
    stream = Stream(PROMPTS, LONG, N, [{(0, 1)}], {0})
    honest = Rollout(PROMPTS[0], [4, 5], [-1.0, -2.0], [0, 0], "length", 0, 1)
    assert stream.fault_of(honest, 0, 55) == ""
    changes, words = FAULTS[fault]
    assert words in stream.fault_of(replace(honest, **changes), 0, 55)


@pytest.mark.usefixtures("real_workers")
def test_one_that_returns_invalid_output_is_replaced(
    small: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process spoils its third rollout; its successor is honest."""
    monkeypatch.setenv("FORERUN_TEST_INVALID", str(tmp_path / "told"))
    with closing(start(small, 1, "faulty_engines:invalid")) as engine:
        assert by_place(engine.stream(PROMPTS, GREEDY, N)) == expected(small, GREEDY)
        assert (tmp_path / "told").exists()
        assert engine.metrics()["replicas"]["lost"] == 1
        assert "returned invalid output" in engine.warnings[0] and "token id outside" in engine.warnings[0]


def test_a_fault_of_the_users_code_is_not_tried_again_and_again(small: Policy) -> None:
    """The successor ends by the same exception: one sentence with its file and line, and no third worker."""
    words = r"RuntimeError: it was made to die \(/.*faulty_engines.py:\d+\); so did the one before it"
    with closing(start(small, 1, "faulty_engines:crashing")) as engine:
        with pytest.raises(ReplicasLost, match=words) as lost:
            list(engine.stream(PROMPTS, LONG, N))
        assert engine.metrics()["replicas"]["lost"] == 2
    with pytest.raises(ReplicasLost):
        Restarts(3).grant(lost.value, Path())


def test_replicas_that_are_lost_again_and_again_stop_the_run(small: Policy) -> None:
    with closing(start(small, 1, "faulty_engines:dying", losses=1)) as engine:
        with pytest.raises(ReplicasLost, match=r"ended with code 7.*; 2 were lost in a row"):
            list(engine.stream(PROMPTS, LONG, N))
        assert engine.metrics()["replicas"]["lost"] == 2


def test_a_model_that_cannot_be_loaded_is_told(small: Policy) -> None:
    with pytest.raises(UserError, match="no such engine for the test"):
        start(small, 1, "faulty_engines:refusing")


def test_a_stream_that_is_left_early_leaves_the_replicas_usable(engine: ReplicatedEngine, small: Policy) -> None:
    stream = engine.stream(PROMPTS, LONG, N)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert by_place(engine.stream(PROMPTS, GREEDY, N)) == expected(small, GREEDY)
    assert engine.metrics()["replicas"]["lost"] == 0


def test_weights_change_in_flight(engine: ReplicatedEngine, small: Policy) -> None:
    """Versions 0 and 5 in the same texts; what follows the change is the new policy's, over the cache of the old."""
    done: list[Weights] = []
    begun = engine.counters.tokens

    def between() -> None:
        if not done and engine.counters.tokens - begun > 100:
            done.append(engine.load(pack_weights(5, changed(small), drafter(), shared=False)))

    found = list(engine.stream(PROMPTS, replace(LONG, max_new_tokens=120), N, between=between))
    assert len(by_place(found)) == len(PROMPTS) * N
    assert {v for r in found for v in r.versions} == {0, 5} and {0, 5} in [set(r.versions) for r in found]
    assert all(r.versions == sorted(r.versions) for r in found)
    assert engine.metrics()["replicas"]["lost"] == 0 and engine.metrics()["version"] == 5


def test_pause_and_resume(engine: ReplicatedEngine) -> None:
    stream = engine.stream(PROMPTS, LONG, N)
    found = [next(stream)]
    engine.pause()
    with pytest.raises(UserError, match="paused"):
        found += list(stream)
    engine.resume()
    assert len(list(engine.stream(PROMPTS, LONG, N))) == len(PROMPTS) * N


def test_mistakes_are_told_once_and_kill_nobody(engine: ReplicatedEngine, small: Policy) -> None:
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        list(engine.stream([[4], []], LONG, 1))
    with pytest.raises(UserError, match="carries no drafter"):
        engine.load(pack_weights(1, small, None, shared=False))
    whole = pack_weights(2, small, drafter(), shared=False)
    with pytest.raises(UserError, match="checksum"):
        engine.load(replace(whole, checksums=dict(whole.checksums) | {"policy": "0"}))
    assert engine.metrics()["replicas"]["lost"] == 0 and engine.metrics()["version"] == 0
    assert {v for r in engine.stream(PROMPTS, LONG, N) for v in r.versions} == {0}


def test_only_some_samples_are_those_of_all(policy: Policy) -> None:
    """The contract's `only`: same seeds, same texts."""
    engine = LocalEngine(policy, slots=3)
    wanted = [(4, 1), (0, 0), (2, 3), (2, 0)]
    everything = by_place(engine.stream(PROMPTS, GREEDY, N))
    assert by_place(engine.stream(PROMPTS, GREEDY, N, wanted)) == {place: everything[place] for place in wanted}
    sampled = by_place(LocalEngine(policy, slots=20).stream(PROMPTS, LONG, N))
    some = by_place(LocalEngine(policy, slots=20).stream(PROMPTS, LONG, N, wanted))
    assert sum(some[p] == sampled[p] for p in wanted) >= 3  # rounding may part one
