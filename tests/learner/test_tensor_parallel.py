"""Layers split over ranks make the updates of one process, as whole ones do: `test_distributed.py` says within what."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_cotrain_distributed as cotrain
import torch
from test_distributed import PLAIN, PROMPTS, REWARDS, RICH, Batch, Outcome, alive, ranks, same, steps, weights
from torch import Tensor

from forerun.algorithms.advantages import group_advantages
from forerun.config import TrainConfig, load_recipe
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.learner.cotrain_distributed import GroupCoTrainer
from forerun.learner.distributed import LearnerGroup
from forerun.learner.learner import Learner
from forerun.learner.tensor_parallel import plan_of
from forerun.models import Policy, load_policy
from forerun.workers.local import LocalLauncher
from forerun.workers.server import PROGRAM

pytestmark = pytest.mark.usefixtures("forked_workers")
TWO = {"tensor_parallel": 2}
CLIPPED = PLAIN.model_copy(update={"max_grad_norm": 2.0})
# Every rank keeps the gradient that its own heads have for the norms of heads.
NORMS_APART = f"""
import forerun.learner.fsdp as shard
plan_of = shard.plan_of
shard.plan_of = lambda model, size: {{m: s for m, s in plan_of(model, size).items() if not m.endswith("_norm")}}
{PROGRAM}
"""
# The ranks of a layer do not divide by their number what they add up.
TWICE = f"""
import forerun.learner.cotrain_worker as worker
added = worker.sum_gradients
worker.sum_gradients = lambda masters, copies: added(masters, 1)
{PROGRAM}
"""


def batches_of(policy: Policy) -> list[Batch]:
    rollouts = LocalEngine(policy, slots=8).generate(PROMPTS, max_new_tokens=12, n=4, seed=1)
    advantages = group_advantages(torch.tensor(REWARDS)).view(-1)
    return [(rollouts, advantages), (rollouts[:2], advantages[:2])]


def compared(folder: Path, count: int, config: TrainConfig, program: str = PROGRAM) -> tuple[Outcome, dict[str, float]]:
    """What ranks do, two of them per layer, and its distance from what one process does."""

    def fresh() -> Policy:
        return load_policy(str(folder), "float32", "cpu")

    batches = batches_of(fresh())
    expected = steps(Learner(fresh(), config, 1.0), batches)
    with ranks(fresh(), count, config.model_copy(update=TWO), program) as group:
        done = list(group.score(batches[0][0]))
        assert done[-1] == 12 and done == sorted(done)
        found = steps(group, batches)
    assert alive(group.pids) == []
    return found, found.differs_from(expected, weights(fresh()))


@pytest.mark.parametrize(
    ("family", "tied", "count", "config"),
    [
        # split in two, and sharded in two; a reference, packed rows
        pytest.param("llama", True, 4, RICH, marks=pytest.mark.slow),
        ("qwen3", False, 2, CLIPPED),  # norms of heads
        pytest.param("qwen2", False, 2, PLAIN, marks=pytest.mark.slow),  # biases
        pytest.param("mistral", True, 2, CLIPPED, marks=pytest.mark.slow),
        pytest.param("gemma3", True, 2, PLAIN, marks=pytest.mark.slow),  # a scaled embedding, norms of heads, windows
        pytest.param("gemma2", False, 2, RICH, marks=pytest.mark.slow),  # eager attention
    ],
)
def test_the_update_is_that_of_one_process(
    tiny: Callable[..., Path], family: str, tied: bool, count: int, config: TrainConfig
) -> None:
    found, differences = compared(tiny(family, tie_word_embeddings=tied), count, config)
    norm = found.metrics[0]["policy/grad_norm"]
    assert norm > 0.1 and (config is not CLIPPED or norm > 1.5 * config.max_grad_norm)
    assert max(differences.values()) < 1, differences


def test_the_comparison_sees_gradients_that_are_not_added_up(tiny: Callable[..., Path]) -> None:
    """The negative control: of one kind of norm alone."""
    _, differences = compared(tiny("qwen3"), 2, PLAIN, NORMS_APART)
    assert differences["weights"] > 10, differences


@pytest.mark.slow
def test_checkpoints_load_on_any_number_of_ranks(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Of AdamW with a reference: split in two, sharded in two, one process, and split again."""
    folder, config = tiny("llama", tie_word_embeddings=True), TrainConfig(kl=0.1, silence_s=30)
    policy = load_policy(str(folder), "float32", "cpu")
    batches = batches_of(policy)
    split = config.model_copy(update=TWO)
    for name in ("split", "process"):
        (tmp_path / name).mkdir()
    with ranks(policy, 4, split) as group:
        steps(group, batches, 1e-3)
        group.save(tmp_path / "split")
        saved = weights(policy)
        expected = steps(group, batches, 1e-3)
        group.restore(tmp_path / "split")
        assert same(weights(policy), saved)
        again = steps(group, batches, 1e-3)
        assert same(again.weights, expected.weights) and again.metrics == expected.metrics

        alone = Learner(load_policy(str(folder), "float32", "cpu"), config, 1.0)
        alone.restore(tmp_path / "split")
        assert same(weights(alone.policy), saved) and alone.optimizer.updates == 2
        alone.save(tmp_path / "process")
        group.restore(tmp_path / "process")
        assert same(steps(group, batches, 1e-3).weights, expected.weights)
    with ranks(load_policy(str(folder), "float32", "cpu"), 2, config) as group:
        group.restore(tmp_path / "split")
        assert same(weights(group.policy), saved)
        metrics = steps(group, batches[:1], 1e-3).metrics[0]
    assert metrics["policy/kl"] == pytest.approx(expected.metrics[0]["policy/kl"], rel=1e-3)


def drafter_beside_split_layers(
    policy: Policy, method: str, batches: list[Batch], program: str = PROGRAM
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and metrics of a drafter that four ranks train, two of them per layer."""
    config = cotrain.TRAIN.model_copy(update={"ranks": 4} | TWO)
    group = LearnerGroup(policy, config, 1.0, LocalLauncher(program=program))
    try:
        trainer = GroupCoTrainer(group, cotrain.drafter_for(method, policy), "every-1", cotrain.CONFIG, 0)
        found = cotrain.steps(group, trainer.score, trainer, batches)
    finally:
        group.close()
    return trainer.head.state_dict(), found


@pytest.mark.parametrize("method", ["eagle3", "mtp, reduced"])
def test_a_drafter_trains_beside_split_layers(tiny: Callable[..., Path], method: str) -> None:
    """The first step is one optimizer step, before anything amplifies rounding: see `test_cotrain_distributed`."""
    policy = cotrain.fresh(tiny)
    batches = cotrain.batches_of(policy)
    batches = cotrain.one_optimizer_step(batches) + batches[1:]
    before = cotrain.drafter_for(method, policy).state_dict()
    expected, metrics = cotrain.alone(tiny, method, batches)
    weights, found = drafter_beside_split_layers(policy, method, batches)
    assert cotrain.apart(before, expected.state_dict()) > 0.5
    assert cotrain.apart(weights, expected.state_dict()) < 0.01
    for step, (mine, theirs) in enumerate(zip(found, metrics, strict=True)):
        assert cotrain.agree(mine, theirs, method, first=step == 0)


def test_only_rounding_keeps_split_layers_apart(tmp_path: Path) -> None:
    """In float64 an MTP head's updates are those of one process: 3e-15 apart at the first, 5e-13 at the third.

    In float32 the same three are 9e-8, 5e-3 and 2e-3 apart (AMX units sum in yet another order): updates amplify what
    the order of sums began, a hundred times and more each, and nothing else is different. Hence the tolerances of
    `cotrain.agree`: 1e-4 for the first optimizer step, 2e-2 for the norms of later ones.
    """
    script = Path(__file__).parents[1] / "helpers" / "split_layers_float64.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path), "mtp, reduced"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert len(gaps) == 3 and gaps[0] < 1e-12 and max(gaps) < 1e-9


def test_the_comparison_sees_gradients_of_a_drafter_that_are_added_up_twice(tiny: Callable[..., Path]) -> None:
    """The negative control: both ranks of a layer have the rows' gradient, and it is counted for each of them."""
    policy = cotrain.fresh(tiny)
    batches = cotrain.one_optimizer_step(cotrain.batches_of(policy))
    _, (expected,) = cotrain.alone(tiny, "mtp, reduced", batches)
    _, (found,) = drafter_beside_split_layers(policy, "mtp, reduced", batches, TWICE)
    assert found["draft/grad_norm"] == pytest.approx(2 * expected["draft/grad_norm"], rel=1e-4)
    assert not cotrain.agree(found, expected, "mtp, reduced")


def test_what_cannot_be_split_is_refused(tiny: Callable[..., Path]) -> None:
    model = load_policy(str(tiny("llama")), "float32", "cpu").model
    plan = plan_of(model, 2)
    assert plan["model.embed_tokens"] == "embedding_rowwise" and plan["lm_head"] == "colwise_gather_output"
    assert len(plan) == 2 + 7 * 4  # four layers of seven matrices
    with pytest.raises(UserError, match="does not divide the 2 key/value heads of LlamaForCausalLM"):
        plan_of(model, 4)
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    with pytest.raises(UserError, match="does not divide the 4 attention heads"):
        LearnerGroup(policy, TrainConfig(ranks=3, tensor_parallel=3), 1.0)
    sparse = load_policy(str(tiny("qwen3")), "float32", "cpu").model
    sparse._tp_plan = {name: style for name, style in sparse.tp_plan.items() if not name.endswith("k_norm")}
    with pytest.raises(UserError, match=r"splits model\.layers\.\d\.self_attn and does not say what .*k_norm; set"):
        plan_of(sparse, 2)
    with pytest.raises(UserError, match=r"tensor_parallel=2 does not divide train\.ranks=3"):
        load_recipe("quickstart", {"train.ranks": 3, "train.tensor_parallel": 2})
    model._tp_plan = dict.fromkeys(model.tp_plan, "unheard_of")
    with pytest.raises(UserError, match="does not know how LlamaForCausalLM is split by unheard_of"):
        plan_of(model, 2)
    with pytest.raises(UserError, match="needs a plan of Transformers for Linear, which has none"):
        plan_of(torch.nn.Linear(2, 2), 2)
