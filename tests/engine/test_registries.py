"""Drafters and engines by name, and parts from outside the package by their path: one file and no line here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import forerun
from extensions.counting_engine import CountingEngine
from extensions.repeat_drafter import RepeatDrafter
from forerun.config import Recipe, SpeculationConfig, load_recipe
from forerun.drafters import DRAFTERS, Rows, load_drafter
from forerun.drafters.base import Drafter
from forerun.engine import ENGINES, RolloutEngine
from forerun.engine.local.engine import LocalEngine
from forerun.engine.vllm.settings import check
from forerun.errors import UserError
from forerun.models import Policy
from forerun.types import Draft

DRAFTER, ENGINE = "extensions.repeat_drafter:RepeatDrafter", "extensions.counting_engine:CountingEngine"
OUTSIDE = {"method": DRAFTER, "k": 3, "settings": {"times": 3}}


@pytest.mark.parametrize("name", DRAFTERS.names())
def test_a_drafter_says_what_a_recipe_has_to_know(name: str) -> None:
    drafter = DRAFTERS.load(name)
    assert issubclass(drafter, Drafter) and drafter.name == name
    assert drafter.trains or not drafter.cotrains
    assert not drafter.trains or drafter.train.__func__ is not Drafter.train.__func__
    assert not drafter.cotrains or drafter.trainable_head is not Drafter.trainable_head
    assert drafter.vllm_refusal or drafter.vllm_config.__func__ is not Drafter.vllm_config.__func__


@pytest.mark.parametrize("name", ENGINES.names())
def test_an_engine_has_both_makers(name: str) -> None:
    engine = ENGINES.load(name)
    assert issubclass(engine, RolloutEngine)
    for maker in ("from_live", "from_folder"):
        assert getattr(engine, maker).__func__ is not getattr(RolloutEngine, maker).__func__


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"speculation.method": "eagel3"},
            "'speculation.method': No drafter is called 'eagel3'; did you mean 'eagle3'?",
        ),
        ({"speculation.method": "xyzzy"}, "there are eagle3, mtp, ngram, trie, model, graft, vllm"),
        ({"rollout.engine": "locla"}, "'rollout.engine': No engine is called 'locla'; did you mean 'local'?"),
        ({"speculation.settings.times": 2}, "settings is not read by method: eagle3"),
        (
            {"speculation.method": DRAFTER, "speculation.settings.tims": 2},
            "settings: Unknown key 'tims'; did you mean",
        ),
        ({"speculation.method": DRAFTER, "speculation.train": "drift"}, "learns beside the policy (eagle3, mtp)"),
        ({"speculation.method": DRAFTER, "speculation.draft_temperature": "auto"}, "(eagle3, mtp, model)"),
    ],
)
def test_mistakes_name_the_nearest(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("quickstart", {"speculation.draft_temperature": 1.0, **overrides})
    assert sentence in str(raised.value)


def test_an_entry_point_names_a_drafter(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"forerun.drafters": [EntryPoint("repeat", DRAFTER, "forerun.drafters")]}
    monkeypatch.setattr("forerun.registry.entry_points", lambda group: mine.get(group, []))
    changes = {"speculation.method": "repeat", "speculation.settings.times": 1, "speculation.draft_temperature": 1.0}
    drafter = load_drafter(policy, load_recipe("quickstart", changes).speculation)
    assert isinstance(drafter, RepeatDrafter) and drafter.settings.times == 1
    with pytest.raises(UserError, match="did you mean 'repeat'"):
        load_recipe("quickstart", {"speculation.method": "repaet"})


def test_a_path_that_leads_nowhere_is_one_sentence(policy: Policy) -> None:
    block = SpeculationConfig(method="extensions.repeat_drafter:Nothing")
    with pytest.raises(UserError, match=r"drafter 'extensions\.repeat_drafter:Nothing' cannot be imported"):
        load_drafter(policy, block)
    with pytest.raises(UserError, match=r"engine 'no\.such:Engine' cannot be imported"):
        forerun.load_engine("no.such:Engine", policy="x")


def test_a_drafter_from_outside_drafts_and_is_exact(policy: Policy) -> None:
    drafter = load_drafter(policy, SpeculationConfig.model_validate(OUTSIDE))
    assert isinstance(drafter, RepeatDrafter) and drafter.settings.times == 3
    engine = CountingEngine.from_live(policy, drafter, SpeculationConfig.model_validate(OUTSIDE), 4)
    plain = CountingEngine.from_live(policy, None, SpeculationConfig(), 4)
    prompts = [[5, 6, 7], [9], [20, 20, 20]]
    drafted, expected = (e.generate(prompts, max_new_tokens=24, temperature=0.0) for e in (engine, plain))
    assert [r.tokens for r in drafted] == [r.tokens for r in expected] and engine.metrics()["drafted"] > 0
    assert (engine.rule, plain.rule) == ("block", "plain")
    with pytest.raises(UserError, match="does not run on the vLLM engine: vLLM has no drafter of this kind"):
        check(SpeculationConfig.model_validate(OUTSIDE))


class BadDrafter(RepeatDrafter):
    """Proposes what it was told to propose."""

    def __init__(self, answer: Callable[[Rows, Tensor], Any]) -> None:
        self.answer = answer

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        return self.answer(rows, budget)  # type: ignore[no-any-return]


def ones(rows: Rows, width: int) -> Tensor:
    return torch.ones(rows.count, width, dtype=torch.int64)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda rows, budget: Draft(ones(rows, 2) * 10**6, budget * 0 + 2), "a token outside the policy's vocabulary"),
        (lambda rows, budget: Draft(ones(rows, 2) - 2, budget * 0 + 2), "a token outside the policy's vocabulary"),
        (lambda rows, budget: Draft(ones(rows, 2).float(), budget * 0 + 2), "tokens of type torch.float32"),
        (lambda rows, budget: None, "None; `propose` returns a Draft"),
        (lambda rows, budget: Draft([[1]] * rows.count, budget), "tokens of type list"),
        (lambda rows, budget: Draft(ones(rows, 3), budget + 1), r"tokens where at most \[.*\] were asked for"),
        (lambda rows, budget: Draft(ones(rows, 2), budget * 0 + 3), r"tokens where at most \[.*\] were asked for"),
        (
            lambda rows, budget: Draft(ones(rows, 4), budget),
            r"tokens of shape \[3, 4\]; the policy expects \[3, up to 3",
        ),
        (lambda rows, budget: Draft(ones(rows, 2)[:1], budget), r"tokens of shape \[1, 2\]"),
        (lambda rows, budget: Draft(ones(rows, 2), budget[:1]), r"lengths of shape \[1\]; the policy expects \[3\]"),
        (lambda rows, budget: Draft(ones(rows, 2), budget * 0 + 2, torch.zeros(3, 1, 55)), r"log_q of shape"),
    ],
)
def test_what_is_no_draft_is_one_sentence(policy: Policy, answer: Any, sentence: str) -> None:
    engine = LocalEngine(policy, BadDrafter(answer), k=3, slots=4)
    with pytest.raises(UserError, match=f"The drafter 'repeat' proposed .*{sentence}"):
        engine.generate([[5, 6, 7], [9], [20, 20, 20]], max_new_tokens=24)


def test_an_engine_from_outside_is_loaded_by_its_path(tiny: Any) -> None:
    engine = forerun.load_engine(ENGINE, policy=str(tiny("llama")), dtype="float32", speculation=OUTSIDE, slots=2)
    assert isinstance(engine, CountingEngine)
    engine.on_state = lambda *state: None
    assert (
        len(engine.generate(["12", [5, 6]], max_new_tokens=4, n=2)) == 4 and engine.metrics()["replicas"]["count"] == 1
    )


def test_the_settings_of_an_outside_drafter_are_written_down() -> None:
    recipe = load_recipe(
        "quickstart",
        {"speculation.draft_temperature": 1.0, "speculation.method": DRAFTER, "speculation.settings.times": 1},
    )
    again = Recipe.model_validate(recipe.model_dump(mode="json"))
    assert again.speculation.settings == {"times": 1} and again.speculation.tokens == 3


def test_recipes_are_read_without_torch(tmp_path: Path) -> None:
    code = (
        "import json, sys; from forerun.config import load_recipe; "
        "load_recipe('quickstart'); load_recipe('gsm8k', {'speculation.method': 'graft', 'rollout.engine': 'vllm'}); "
        "print(json.dumps('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
