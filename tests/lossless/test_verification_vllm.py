"""`forerun verify --engine vllm` on a tiny policy: it passes, and finds the fault of vLLM's CPU build where it is left.

Skipped where vLLM is not installed (docs/vllm.md).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from forerun.config import Recipe, load_recipe
from forerun.errors import UserError
from forerun.events import finish
from forerun.lossless.harness import Effort, verify_recipe
from forerun.models import load_policy
from vllm_tiny import SHAPE, frequent, head_for

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; docs/vllm.md says how"
)
SMALL = Effort(6, 4, 4, 400, 6, 16, 0, 8, 4096)


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("verify")
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    model = tiny("llama", initializer_range=0.25, **SHAPE)
    policy = load_policy(str(model), "float32", "cpu")
    head_for(policy, frequent(policy)).save(folder / "drafter", {})
    data = {
        "name": "tiny",
        "policy": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(folder / "sums.jsonl"), "eval_path": str(folder / "sums.jsonl")},
        "speculation": {"method": "eagle3", "draft": str(folder / "drafter"), "k": 3},
        "rollout": {"engine": "vllm", "slots": 32, "max_new_tokens": 24, "temperature": 0.7},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return load_recipe(str(folder / "tiny.yaml"))


@needs_vllm
def test_vllm_passes(recipe: Recipe) -> None:
    verdict = finish(verify_recipe(recipe, effort=SMALL))
    assert verdict.passed, verdict.to_text()
    assert verdict.about["engine"] == "vllm" and "token" in verdict.about["speculation"]


@needs_vllm
def test_vllms_own_fault_is_found(recipe: Recipe) -> None:
    """At another temperature than 1, so that rows without their own show."""
    verdict = finish(verify_recipe(recipe, effort=SMALL, inject="upstream"))
    assert not verdict.passed and "joint law" in verdict.failed_claims, verdict.to_text()


def test_faults_are_of_one_engine(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="no fault 'no_residual' to inject into the engine 'vllm'"):
        finish(verify_recipe(recipe, inject="no_residual"))
    local = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"engine": "local"})})
    with pytest.raises(UserError, match="no fault 'upstream' to inject into the engine 'local'"):
        finish(verify_recipe(local, inject="upstream"))
