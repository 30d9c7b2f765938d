"""What a resumed run takes over, what it refuses; one process at a time; a new run on an earlier one's weights."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forerun
from command_line import run_here
from forerun.config import TrainConfig, load_recipe
from forerun.errors import Interrupted, UserError
from forerun.events import StepDone, finish
from forerun.learner.learner import Learner
from forerun.models import load_policy
from forerun.tracking.run_lock import RunLock
from forerun.training.resume import recipe_from, resumed_recipe
from forerun.training.run import run
from kill_runs import lines, write_recipe

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a drafter that is trained before step 1."""
    return write_recipe(tmp_path_factory.mktemp("resume"), tiny("llama"), eval={"prompts": 0})


@pytest.fixture(scope="module", autouse=True)
def helpers_importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
        yield


@pytest.fixture(scope="module")
def begun(recipe: Path) -> Path:
    """A finished run of two steps."""
    return Path(forerun.train(str(recipe), {"train.steps": 2})["run"])


def test_what_is_set_at_a_resume_is_set_for_the_next_one_too(recipe: Path) -> None:
    half = Path(forerun.train(str(recipe), {"train.steps": 2})["run"])
    work = run(resumed_recipe(half, {"train.steps": 200, "train.learning_rate": 1e-4}), half)
    with pytest.raises(Interrupted):
        for event in work:
            if isinstance(event, StepDone) and event.step == 4:
                work.throw(Interrupted(signal.SIGTERM))
    kept = load_recipe(str(half / "config.resolved.yaml"))
    assert kept.train.steps == 200 and kept.train.learning_rate == 1e-4 and kept == resumed_recipe(half, {})
    again = finish(run(resumed_recipe(half, {"train.steps": 5}), half))
    assert again["steps"] == 5 and [r["step"] for r in lines(half / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert lines(half / "metrics.jsonl")[-1]["policy/lr"] == 1e-4


def test_settings_of_the_optimizer_are_in_force_after_a_resume(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def learner(**settings: Any) -> Learner:
        return Learner(load_policy(str(tiny("llama")), "float32", "cpu"), TrainConfig(**settings), 1.0)

    for first, second in (
        ({}, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
        ({"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.2}),
    ):
        learner(**first).save(tmp_path)
        resumed = learner(**second)
        resumed.restore(tmp_path)
        (group,) = resumed.optimizer.inner.param_groups
        assert all(group[key] == value for key, value in second.items() if key != "optimizer")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.model", "/another"),
        ("policy.adapter", "/another"),
        ("cold_start.steps", 3),
        ("speculation.draft", "/another"),
        ("speculation.method", "ngram"),
        ("train.optimizer", "sgd"),
        ("train.kl", 0.1),
        ("seed", 7),
        ("draft.vocab", 40),
        ("name", "other"),
        ("runs", "/another"),
    ],
)
def test_what_a_checkpoint_decides_is_refused_by_name(begun: Path, key: str, value: Any) -> None:
    words = rf"A resumed run cannot change {key.removesuffix('.steps')}.*: forerun train RECIPE --from"
    with pytest.raises(UserError, match=words):
        resumed_recipe(begun, {key: value})


def test_what_changes_nothing_or_can_be_applied_is_not_refused(begun: Path) -> None:
    own = load_recipe(str(begun / "config.resolved.yaml"))
    changes = {"speculation.method": "none", "train.steps": 9, "seed": own.seed, "policy.model": own.policy.model}
    assert resumed_recipe(begun, changes).speculation.tokens == 0


def test_a_run_that_is_under_way_is_not_resumed(begun: Path) -> None:
    """The lock of a process that lives; that of a killed one is no trouble."""
    program = "import sys, time\nfrom pathlib import Path\nfrom forerun.tracking.run_lock import RunLock\n"
    program += "RunLock().take(Path(sys.argv[1]))\nprint('locked', flush=True)\ntime.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", program, str(begun)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    done = run_here("train", "--resume", str(begun), "train.steps=3")
    assert done.returncode == 2 and f"{begun} is under way in another process" in done.stderr
    assert f"pid {other.pid}" in done.stderr and done.stderr.count("\n") == 1
    other.kill()
    other.wait()
    lock = RunLock()
    lock.take(begun)
    lock.take(begun)
    assert f"pid {os.getpid()}" in (begun / ".lock").read_text()
    lock.close()


def test_a_new_run_begins_with_the_weights_of_an_earlier_one(begun: Path, recipe: Path) -> None:
    old = json.loads((begun / "summary.json").read_text())
    done = run_here("train", "--from", str(begun), "train.steps=0", "--json")
    assert done.returncode == 0, done.stderr
    new = json.loads(done.stdout)
    assert new["run"] != old["run"] and new["steps"] == 0
    assert new["weights"] == {**old["weights"], "version": 0}
    chosen = load_recipe(str(Path(new["run"]) / "config.resolved.yaml"))
    assert chosen.policy.model == str(begun / "hf" / "policy")
    assert chosen.speculation.draft == str(begun / "hf" / "drafter")
    named = recipe_from(begun, str(recipe), {"train.steps": 7, "speculation.method": "ngram"})
    assert named.train.steps == 7 and named.speculation.draft is None
    with pytest.raises(UserError, match=r"sets policy\.model, and so does the command line"):
        recipe_from(begun, str(recipe), {"policy.model": "/x"})


def test_a_new_run_begins_with_the_newest_weights(recipe: Path, tmp_path: Path) -> None:
    """A checkpoint beyond the end of the run; an adapter with its base; nothing at all."""
    path = Path(
        forerun.train(str(recipe), {"train.steps": 1, "train.lora.rank": 2, "speculation.method": "none"})["run"]
    )
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"steps": 0}))
    chosen = recipe_from(path, None, {}).policy
    assert (chosen.model, chosen.adapter) == tuple(
        str(path / "checkpoints/step-000001" / n) for n in ("base", "adapter")
    )
    merged = load_policy(chosen.model, "float32", "cpu", chosen.adapter).model.state_dict()
    learnt = load_policy(str(path / "hf" / "policy"), "float32", "cpu").model.state_dict()
    assert max(float((learnt[name] - tensor).abs().max()) for name, tensor in merged.items()) < 1e-6
    (tmp_path / "config.resolved.yaml").write_text((path / "config.resolved.yaml").read_text())
    with pytest.raises(UserError, match="holds no weights to begin with"):
        recipe_from(tmp_path, None, {})


def test_weights_and_moments_are_read_to_the_cpu() -> None:
    """Else a checkpoint of a GPU is read there a second time, or cannot be read elsewhere."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "map_location" in {k.arg for k in node.keywords}, f"{path}:{node.lineno}"
