"""What ships: the quickstart's policy and drafter, real weights. Slow: 135 million parameters on a CPU."""

from __future__ import annotations

import pytest

from forerun.artifacts import FOLDER, shipped, verify_artifact
from forerun.config import load_recipe
from forerun.drafters import load_drafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.models import Policy, load_policy
from forerun.tasks import load_task
from forerun.training.prompts import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart() -> tuple[Policy, list[list[int]]]:
    """The quickstart's policy in float32 with 64 held-out prompts."""
    recipe = load_recipe("quickstart")
    policy = load_policy(recipe.policy.model, "float32", "cpu", recipe.policy.adapter)
    problems = load_task(recipe.task).problems("eval")[:64]
    return policy, [encode(p, recipe, policy) for p in problems]


def test_artifacts_are_whole_and_small() -> None:
    assert set(shipped()) == {"quickstart-cold-start", "quickstart-eagle3"}
    assert [verify_artifact(name) for name in shipped()] == [None, None]
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 40e6


def test_greedy_identity_on_64_prompts(quickstart: tuple[Policy, list[list[int]]]) -> None:
    """64 prompts, 64 tokens, float32: speculative text is the plain text, token for token."""
    policy, prompts = quickstart
    sampling = Sampling(64, 0.0, ignore_eos=True)
    plain = sorted(LocalEngine(policy, slots=32).stream(prompts, sampling), key=lambda r: r.prompt_index)
    engine = LocalEngine(policy, load_drafter(policy, load_recipe("quickstart").speculation), k=4, slots=32)
    speculative = sorted(engine.stream(prompts, sampling), key=lambda r: r.prompt_index)
    assert [r.tokens for r in speculative] == [r.tokens for r in plain]
    assert all(len(r.tokens) == 64 for r in plain) and (engine.counters.acceptance_length or 0) > 2


def test_the_shipped_drafter_fits_the_shipped_policy(quickstart: tuple[Policy, list[list[int]]]) -> None:
    """Sampled at T = 1: well over two tokens per round, and answers of the length that the manifest states."""
    policy, prompts = quickstart
    recipe = load_recipe("quickstart")
    engine = LocalEngine(policy, load_drafter(policy, recipe.speculation), k=4, slots=32)
    rollouts = engine.generate(prompts, max_new_tokens=recipe.rollout.max_new_tokens, seed=5)
    assert (engine.counters.acceptance_length or 0) > 2.5
    expected = shipped()["quickstart-cold-start"]["tokens_per_answer"]
    mean = sum(len(r.tokens) for r in rollouts) / len(rollouts)
    assert mean == pytest.approx(expected, rel=0.3)  # answers are short or long: the mean of 64 varies by a tenth
