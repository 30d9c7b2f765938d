"""`forerun verify` on a tiny float32 policy with a poor drafter: it passes as it is, and fails with every fault.

The policy is random and unsure, so that small samples have power: the law claim finds variations of a few percent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from forerun.config import Recipe, load_recipe
from forerun.errors import UserError
from forerun.events import finish
from forerun.lossless.faults import FAULTS
from forerun.lossless.harness import Effort, verify_recipe
from forerun.models import load_policy
from tiny_models import random_drafter

SMALL = Effort(8, 6, 6, 800, 8, 16, 0, 12, 4096)
LAW, TWO_SAMPLES, LOGPROBS, VERSIONS = "joint law", "two samples", "log-probabilities", "weight versions"
CAUGHT_BY = {"draft_logprobs": LOGPROBS, "neighbour_logprobs": LOGPROBS, "silent_load": VERSIONS}


@pytest.fixture(scope="module")
def recipe_file(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    model = tiny("llama", initializer_range=0.25)
    random_drafter(load_policy(str(model), "float32", "cpu")).save(folder / "drafter", {})
    data = {
        "name": "tiny",
        "policy": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(folder / "sums.jsonl"), "eval_path": str(folder / "sums.jsonl")},
        "speculation": {"method": "eagle3", "draft": str(folder / "drafter"), "k": 3},
        "rollout": {"slots": 256, "max_new_tokens": 24},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(str(recipe_file))


@pytest.mark.parametrize("rule", ["block", "token"])
def test_a_sound_engine_passes(recipe_file: Path, rule: str) -> None:
    settings = load_recipe(str(recipe_file), {"speculation.verify": rule})
    verdict = finish(verify_recipe(settings, effort=SMALL))
    assert verdict.passed, verdict.to_text()
    assert [claim.name for claim in verdict.claims] == ["greedy identity", TWO_SAMPLES, LAW, LOGPROBS, VERSIONS]
    json.dumps(verdict.to_dict())


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_its_claim_named(recipe: Recipe, fault: str) -> None:
    verdict = finish(verify_recipe(recipe, effort=SMALL, inject=fault))
    assert not verdict.passed
    assert CAUGHT_BY.get(fault, LAW) in verdict.failed_claims, verdict.to_text()


@pytest.mark.slow
def test_the_verb_writes_its_page_and_exits_with_1_on_a_fault(recipe_file: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "forerun.cli", "verify", str(recipe_file), "--quick", "--json", "--out"]
    done = subprocess.run([*words, str(tmp_path), "--inject", "no_residual"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    verdict = json.loads(done.stdout)
    assert not verdict["passed"] and LAW in verdict["failed_claims"] and verdict["injected_fault"] == "no_residual"
    assert "FAILED" in (tmp_path / "verification.html").read_text()
    assert json.loads((tmp_path / "verification.json").read_text())["failed_claims"] == verdict["failed_claims"]


def test_nothing_to_verify_and_unknown_faults_are_one_sentence(recipe_file: Path) -> None:
    with pytest.raises(UserError, match="does not speculate"):
        finish(verify_recipe(load_recipe(str(recipe_file), {"speculation.method": "none"})))
    with pytest.raises(UserError, match="There is no fault 'gremlins'"):
        finish(verify_recipe(load_recipe(str(recipe_file)), inject="gremlins"))
