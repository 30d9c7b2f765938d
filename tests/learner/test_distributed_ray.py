"""Ranks that are Ray actors: the updates of one process, under real kills, and whole runs. Ray's part needs `ray`.

Tolerances of ranks: `test_distributed.py`. In whole runs SGD learns, in float32, by engines of one slot: samples
are equal, losses and norms agree within 1e-4 of their size, weights within 1e-4. What is decoded greedily there is the
evaluations: greedy samples of one prompt are all alike, and nothing would be learnt from them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_distributed
import torch
import yaml
from test_distributed import PLAIN, Batch, alive, steps, weights

import forerun
from forerun.config import ClusterConfig, TrainConfig, load_recipe
from forerun.errors import UserError
from forerun.events import CountStream, finish
from forerun.learner import distributed
from forerun.learner.distributed import LearnerGroup, open_store, rank_devices
from forerun.learner.learner import Learner
from forerun.learner.shared_folder import folder_fault, probe_file
from forerun.learner.worker import interface_of
from forerun.models import Policy, load_policy
from forerun.workers import ray as cluster
from forerun.workers.group import RanksLost
from forerun.workers.handle import LOOPBACK
from forerun.workers.ray import RayLauncher
from private_ray import ray_settings

LOCAL = ClusterConfig(address="local")
fresh, batches = test_distributed.fresh, test_distributed.batches


# ---- without Ray ----


def launchers(changes: dict[str, Any]) -> tuple[bool, bool]:
    """Whether replicas and ranks of a recipe are Ray's to start."""
    recipe = load_recipe("quickstart", changes)
    counts = (recipe.rollout.replicas, recipe.train.ranks)
    replica, rank = (cluster.ray_launcher(recipe.cluster, kind, *counts) for kind in ("replica", "rank"))
    return replica is not None, rank is not None


def test_ranks_alone_may_be_placed_on_a_cluster() -> None:
    ranks = {"cluster.address": "local", "train.ranks": 2}
    replicas = {"train.ranks": 1, "rollout.replicas": 1, "compare.steps": 0}
    assert launchers(ranks) == (False, True)
    assert launchers(ranks | replicas) == (True, False)
    assert launchers({"train.ranks": 2}) == (False, False)
    with pytest.raises(UserError, match=r"rollout\.replicas is 0 and train\.ranks is 1"):
        load_recipe("quickstart", ranks | {"train.ranks": 1})
    with pytest.raises(UserError, match=r"cluster\.gpus_per_rank"):
        load_recipe("quickstart", ranks | {"cluster.gpus_per_rank": 2})


def test_a_policy_on_a_gpu_is_not_trained_on_cpus_unasked() -> None:
    gpu = torch.device("cuda:0")
    with pytest.raises(UserError, match=r"cluster\.gpus_per_rank=0 would train it on CPUs"):
        rank_devices(gpu, 2, RayLauncher(LOCAL, "rank", 0, 2))
    with_gpus = LOCAL.model_copy(update={"gpus_per_rank": 1})
    assert rank_devices(gpu, 2, RayLauncher(with_gpus, "rank", 0, 2)) == ["cuda:0", "cuda:0"]


def test_a_folder_is_shared_when_its_newest_file_is_seen(tmp_path: Path) -> None:
    with probe_file(tmp_path) as (file, words):
        assert folder_fault(file, words) == "" and folder_fault(file, words + "x") == "does not see"
        assert folder_fault(tmp_path / "elsewhere" / file.name, words) == "does not see"
        if os.getuid() != 0:  # who may write everywhere
            tmp_path.chmod(0o500)
            assert folder_fault(file, words) == "may not write to"
            tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_ranks_meet_at_the_address_that_was_chosen_and_no_other() -> None:
    store, (host, port) = open_store(LOOPBACK)
    assert host == LOOPBACK and port == store.port  # type: ignore[attr-defined]
    other = torch.distributed.TCPStore(host, port, is_master=False)
    other.set("word", "heard")
    assert store.get("word") == b"heard"
    assert interface_of("203.0.113.7") is None  # an address for examples, which nobody has
    if sys.platform == "linux":
        assert interface_of(LOOPBACK) == "lo"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))  # the same machine by another name


# ---- with Ray ----


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A private Ray of four CPUs (so Ray is told, whatever the machine has)."""
    module = pytest.importorskip("ray", reason="Ray is not installed: pip install 'forerun[ray]'")
    with ray_settings(Path(__file__).parents[1] / "helpers"):
        assert cluster.connect(LOCAL, 2, 2) is module
        yield module
        module.shutdown()


def group_of(
    policy: Policy, config: TrainConfig, count: int, folder: Path, settings: ClusterConfig = LOCAL
) -> LearnerGroup:
    launcher = RayLauncher(settings, "rank", 2, count)
    return LearnerGroup(policy, config.model_copy(update={"ranks": count}), 1.0, launcher, run_folder=folder)


def gone(pids: list[int]) -> bool:
    until = time.monotonic() + 20
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    return alive(pids) == []


@pytest.mark.slow
def test_two_actors_make_the_update_of_one_process_until_one_is_killed(
    ray: Any, fresh: Callable[[], Policy], batches: list[Batch], tmp_path: Path
) -> None:
    """Killed in mid-update, while the other is stopped and says nothing: the right one is named, and none is left."""
    start, expected = weights(fresh()), steps(Learner(fresh(), PLAIN, 1.0), batches)
    assert expected.metrics[0]["policy/grad_norm"] > 0.1 and abs(expected.metrics[0]["policy/loss"]) > 1e-4
    with closing(group_of(fresh(), PLAIN, 2, tmp_path)) as group:
        pids = group.pids
        assert len(set(pids)) == 2 and os.getpid() not in pids and list(tmp_path.iterdir()) == []
        differences = steps(group, batches).differs_from(expected, start)
        assert max(differences.values()) < 1, differences
        group.save(tmp_path)
        saved = weights(group.policy)
        scored = finish(group.score(batches[0][0]))
        finish(group.update(*batches[0], scored, 0.01))
        group.restore(tmp_path)
        assert test_distributed.same(weights(group.policy), saved)

        with pytest.raises(RanksLost, match=r"Rank 1 of the learner was lost by the cluster.*; all 2 were ended"):
            for _ in group.update(*batches[0], scored, 0.01):
                os.kill(pids[0], signal.SIGSTOP)
                os.kill(pids[1], signal.SIGKILL)
        assert gone(pids)


@pytest.mark.slow
def test_actors_end_with_their_driver(
    ray: Any, fresh: Callable[[], Policy], batches: list[Batch], tmp_path: Path
) -> None:
    """The connections end as the system ends those of a process that dies; Ray is not asked for anything.

    As on a cluster of several machines, all speak through the address by which Ray knows this one.
    """
    with closing(group_of(fresh(), PLAIN, 2, tmp_path, ClusterConfig(address="auto"))) as group:
        assert len(finish(group.score(batches[0][0])).logprobs) == 12
        for worker in group._ranks._workers:
            worker.connection.close()
        assert gone(group.pids)


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_run_folder_is_refused(
    ray: Any, fresh: Callable[[], Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def elsewhere(folder: Path) -> Iterator[tuple[Path, str]]:  # what a rank finds whose disk is another one
        yield folder / "nowhere", "words"

    monkeypatch.setattr(distributed, "probe_file", elsewhere)
    with pytest.raises(UserError, match=f"Rank 0 of the learner does not see the run folder {tmp_path}, .*set runs to"):
        group_of(fresh(), PLAIN, 1, tmp_path)


@pytest.mark.slow
def test_ranks_that_do_not_fit_are_told(
    ray: Any, fresh: Callable[[], Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "START_S", 2.0)
    settings = ClusterConfig(address="local", cpus_per_rank=3)
    with pytest.raises(UserError, match="Rank 0 of the learner was not placed in 2 s: it needs 3 CPUs and 0 GPUs"):
        group_of(fresh(), TrainConfig(silence_s=20), 2, tmp_path, settings)


# ---- whole runs ----


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a tiny model on twenty sums; held-out sums are answered greedily."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "ranks", "runs": str(folder / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(folder / "sums.jsonl"), "reward": "rewards_for_tests:variety"},
        "draft": {"rollouts": 16, "epochs": 1, "depth": 2, "vocab": 30},
        "rollout": {"slots": 1, "max_new_tokens": 10},
        "train": {"steps": 3, "prompts_per_step": 2, "samples_per_prompt": 3, "optimizer": "sgd",
                  "learning_rate": 0.1},
        "eval": {"prompts": 2, "temperature": 0.0}, "checkpoint": {"every": 1},
    }  # fmt: skip
    path = folder / "ranks.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def lines(run: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run["paths"][name]).read_text().splitlines()]


def is_the_run_of(here: dict[str, Any], there: dict[str, Any], start: Path) -> None:
    """The same samples and rewards, and what was learnt from them."""
    assert [(r["prompt"], r["text"], r["reward"]) for r in lines(there, "rollouts")] == [
        (r["prompt"], r["text"], r["reward"]) for r in lines(here, "rollouts")
    ]
    expected, found = lines(here, "metrics"), lines(there, "metrics")
    assert len(expected) == len(found) and [r["step"] for r in expected] == [r["step"] for r in found]
    for mine, other in zip(found, expected, strict=True):
        for name in [n for n in other if n.startswith(("reward/", "rollout/", "eval/"))]:
            assert mine[name] == other[name], name
        for name in [n for n in ("policy/loss", "policy/grad_norm") if n in other]:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert all(row.get("policy/grad_norm", 1.0) > 0.01 for row in expected)
    before, mine, other = (load_policy(str(p), "float32", "cpu").model.state_dict()
                           for p in (start, there["paths"]["policy"], here["paths"]["policy"]))  # fmt: skip
    moved = max(float((other[name] - before[name]).abs().max()) for name in other)
    assert moved > 1e-3
    assert max(float((mine[name] - other[name]).abs().max()) for name in mine) < min(1e-4, 0.01 * moved)


PLACED = {"cluster.address": "local", "rollout.replicas": 2, "train.ranks": 2}


@pytest.fixture(autouse=True)
def rewards_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))


@pytest.mark.slow
def test_a_speculating_run_of_replicas_and_ranks_is_the_run_of_one_process(
    ray: Any, tiny: Callable[..., Path], recipe: Path
) -> None:
    eagle3 = {"speculation.method": "eagle3"}
    here = forerun.train(str(recipe), eagle3)
    assert any(row.get("spec/acceptance_length", 1.0) > 1.0 for row in lines(here, "metrics"))
    there = forerun.train(str(recipe), eagle3 | PLACED | {"speculation.draft": here["paths"]["draft"]})
    assert there["warnings"] == here["warnings"]
    is_the_run_of(here, there, tiny("llama"))


@pytest.mark.slow
def test_a_run_that_loses_an_actor_goes_back_by_itself(
    ray: Any, tiny: Callable[..., Path], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second step's update: it goes on from the first step's checkpoint, with new actors.

    Ray has room for four of them: those of the lost run have to make theirs free. Plain decoding.
    """
    here = forerun.train(str(recipe))
    update, pids = LearnerGroup.update, []

    def killing(self: LearnerGroup, *arguments: Any) -> CountStream[dict[str, float]]:
        pids.append(self.pids)
        if len(pids) == 2:
            os.kill(self.pids[1], signal.SIGKILL)
        return update(self, *arguments)

    monkeypatch.setattr(LearnerGroup, "update", killing)
    there = forerun.train(str(recipe), PLACED | {"rollout.replicas": 1})
    assert len(pids) == 4 and pids[0] == pids[1] and pids[2] == pids[3] and not set(pids[0]) & set(pids[2])
    (warning,) = there["warnings"]
    assert "goes back to step-000001" in warning and "Rank 1 of the learner was lost by the cluster" in warning
    is_the_run_of(here, there, tiny("llama"))
    assert gone(pids[0] + pids[2])
