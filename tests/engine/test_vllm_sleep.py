"""Sleep and wake of the vLLM engine, and the three ways in which a drafter is lost on the way, none of them silent.

On a CPU the engine frees the memory itself (`engine/vllm/sleep.py`); vLLM's own sleep needs a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from forerun.drafters.draft_model import ModelDrafter
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.engine.base import Sampling
from forerun.engine.vllm.worker import WeightReceiver
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from vllm_tiny import PROMPTS, changed, make, needs_vllm, resident, texts, version

pytestmark = [needs_vllm, pytest.mark.slow]
LONG = Sampling(40, 1.0, 2, ignore_eos=True)
WHOLE = pytest.approx(3.9)  # tokens a round of LONG when all drafts are kept: 1 + 9 * 4 + 3 tokens in 11 - 1 rounds


@pytest.fixture(scope="module")
def own(small: Policy) -> ModelDrafter:
    """The policy drafts for itself: all drafts are kept as long as it has the policy's weights."""
    return ModelDrafter(load_policy(small.name, "float32", "cpu"), small)


@pytest.fixture(scope="module")
def sleeper(small: Policy, own: ModelDrafter) -> Iterator[Any]:
    block = {"method": "model", "draft": "given", "k": 3, "verify": "token"}
    made = make(small, own, block, sleep=True, cache_gib=0.1)
    yield made
    made.close()


@pytest.fixture
def rested(sleeper: Any, small: Policy, own: ModelDrafter) -> Any:
    """The sleeper awake, with the first weights, a known acceptance and no warnings."""
    sleeper.wake()
    sleeper.load(version(max(9, sleeper.metrics()["version"] or 9), small, own))
    sleeper.warnings.clear()
    assert acceptance(sleeper) == WHOLE
    return sleeper


def acceptance(engine: Any) -> float | None:
    """Tokens a round of another stream."""
    before = engine.counters.copy()
    list(engine.stream(PROMPTS, LONG, 4))
    return engine.counters.minus(before).acceptance_length


def test_a_slept_engine_goes_on_as_before(rested: Any) -> None:
    before = texts(rested.generate(PROMPTS, max_new_tokens=24, temperature=0.0))
    held, filled = rested.metrics()["version"], resident()
    rested.sleep(1)
    assert filled - resident() > 0.9 * 0.1 * 2**30, "the KV cache of 0.1 GiB was not given back"
    with pytest.raises(UserError, match="asleep; call wake"):
        rested.generate([[5]])
    with pytest.raises(UserError, match="asleep already"):
        rested.sleep(2)
    rested.wake()
    assert rested.metrics()["version"] == held
    assert texts(rested.generate(PROMPTS, max_new_tokens=24, temperature=0.0)) == before
    assert acceptance(rested) == WHOLE
    assert not rested.warnings


def test_discarded_weights_must_come_back_whole(rested: Any, small: Policy, own: ModelDrafter) -> None:
    before = texts(rested.generate(PROMPTS, max_new_tokens=24, temperature=0.0))
    number = rested.metrics()["version"]
    right = version(number + 1, small, own)
    rested.sleep(2)
    with pytest.raises(UserError, match="asleep; call wake"):
        rested.load(right)
    rested.wake()
    assert (rested.metrics()["version"], rested.metrics()["checksums"]) == (None, {})
    for wrong, reason in (
        (dataclasses.replace(right, policy=None, draft=None), "must carry the tensors"),
        (dataclasses.replace(right, draft=None), "must carry the tensors"),
        (dataclasses.replace(right, version=number - 1), "is older than version"),
        (version(number, small, ModelDrafter(changed(small, 1.0, seed=3), small)), "one number, two versions"),
    ):
        with pytest.raises(UserError, match=reason):
            rested.load(wrong)
        with pytest.raises(UserError, match="load a version again"):
            rested.generate([[5]])
    assert rested.load(right).version == number + 1
    assert texts(rested.generate(PROMPTS, max_new_tokens=24, temperature=0.0)) == before
    assert acceptance(rested) == WHOLE
    assert not rested.warnings


@pytest.mark.parametrize("group", ["policy", "draft"])
def test_a_wake_that_drops_weights_is_an_error(
    rested: Any, small: Policy, own: ModelDrafter, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = WeightReceiver.forerun_wake

    def forgetful(self: Any) -> None:
        woken(self)
        _zero({"policy": self.model_runner.model, "draft": self.model_runner.drafter.model}[group])

    rested.sleep(1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"woke with other weights of the {group}"):
        patch.setattr(type(rested._vllm.model_executor.driver_worker.worker), "forerun_wake", forgetful)
        rested.wake()
    with pytest.raises(UserError, match="load a version again"):
        rested.generate([[5]])
    rested.load(version(20, small, own))
    assert acceptance(rested) == WHOLE


def test_the_probe_catches_a_drafter_that_is_lost_behind_every_check(rested: Any) -> None:
    """Its weights go after the wake was found to be in order: only acceptance can tell."""
    rested.sleep(1)
    rested.wake()
    rested._vllm.collective_rpc(lambda worker: _zero(worker.model_runner.drafter.model))
    list(rested.stream(PROMPTS, LONG, 4))
    assert any("collapsed" in warning for warning in rested.metrics()["warnings"])


def test_a_load_that_skips_the_drafter_is_an_error(
    rested: Any, small: Policy, own: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rested.sleep(2)
    rested.wake()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="took no parameter of the draft"):
        patch.setattr(WeightReceiver, "_forerun_drafter", lambda self, state, draft_temperature: 0)
        rested.load(version(30, small, own))
    with pytest.raises(UserError, match="load a version again"):
        rested.generate([[5]])
    rested.load(version(30, small, own))
    assert acceptance(rested) == WHOLE


def test_stale_bytes_under_a_new_number(rested: Any, small: Policy, own: ModelDrafter) -> None:
    """With the new version's checksum they are refused; with their own, only acceptance can tell."""
    other = changed(small, 2.0, seed=3)
    new = version(40, other, ModelDrafter(other, other))
    stale = version(40, other, own)
    rested.sleep(2)
    rested.wake()
    with pytest.raises(UserError, match="arrived"):
        rested.load(dataclasses.replace(new, draft=stale.draft))
    rested.load(stale)
    list(rested.stream(PROMPTS, LONG, 4))
    assert any("collapsed" in warning for warning in rested.metrics()["warnings"])


@pytest.mark.parametrize("level", [1, 2])
def test_a_head_sleeps_with_its_policy(fresh: Any, small: Policy, drafter: Eagle3Drafter, level: int) -> None:
    """An EAGLE-3 head shares the policy's embedding, and keeps a map of its vocabulary among its weights."""
    before = fresh.generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    fresh.sleep(level)
    fresh.wake()
    if level == 2:
        fresh.load(version(0, small, drafter))
    again = fresh.generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    assert texts(again) == texts(before)
    assert [r.drafted for r in again] == [r.drafted for r in before]
    assert sum(sum(r.drafted) for r in again) > 0


def test_when_an_engine_may_not_sleep(rested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="levels 1 and 2"):
        rested.sleep(3)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"Limits\(sleep=True\)"):
        patch.setattr(rested, "limits", dataclasses.replace(rested.limits, sleep=False))
        rested.sleep(1)
    stream = rested.stream([[5], [6]], Sampling(4, 1.0, 0))
    next(stream)
    with pytest.raises(UserError, match="close its stream"):
        rested.sleep(1)
    stream.close()
    rested.wake()  # awake already: nothing happens
    assert len(rested.generate([[5]], max_new_tokens=3)) == 1


def _zero(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()
