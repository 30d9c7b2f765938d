"""Replicas as Ray actors: the same samples, under real kills, and on machines that go away. Ray's part needs `ray`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

import faulty_engines
import forerun
from forerun.config import ClusterConfig, Recipe, RolloutConfig, SpeculationConfig, load_recipe
from forerun.drafters.ngram import NgramDrafter
from forerun.engine import Sampling, build_engine
from forerun.engine.local.engine import LocalEngine
from forerun.engine.replicated import MAKE, ReplicatedEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.training.weights import pack_weights
from forerun.workers import ray as cluster
from forerun.workers import wire
from forerun.workers.handle import LOOPBACK, Launcher, Timeouts
from private_ray import ray_settings

PROMPTS = [[5, 6, 7], [9, 3], [3, 4, 5, 6, 7, 8], [20, 21]]
GREEDY = Sampling(48, 0.0, 3, ignore_eos=True)
N = 3
HASTY = Timeouts(heartbeat_s=10.0, start_s=240.0)


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    """Actors find `faulty_engines.py`."""
    with ray_settings(Path(faulty_engines.__file__).parent):
        yield
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama")), "float32", "cpu")


def block() -> SpeculationConfig:
    return SpeculationConfig.model_validate({"method": "ngram", "k": 3, "ngram": {"prompt_lookup_min": 1}})


def start(policy: Policy, settings: ClusterConfig, replicas: int, make: str = MAKE) -> ReplicatedEngine:
    return ReplicatedEngine(
        "local", policy, NgramDrafter(block().ngram), block(), slots=4, replicas=replicas, timeouts=HASTY, make=make,
        launcher=cluster.RayLauncher(settings, "replica", replicas, 1),
    )  # fmt: skip


def by_place(rollouts: Any) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for rollout in rollouts:
        assert (rollout.prompt_index, rollout.sample_index) not in found
        found[rollout.prompt_index, rollout.sample_index] = rollout.tokens
    return found


def expected(policy: Policy) -> dict[tuple[int, int], list[int]]:
    return by_place(LocalEngine(policy, slots=4).stream(PROMPTS, GREEDY, N))


def launcher_of(recipe: Recipe) -> Launcher | None:
    return cluster.ray_launcher(recipe.cluster, "replica", recipe.rollout.replicas, recipe.train.ranks)


# ---- without Ray ----


def test_a_cluster_is_for_replicas() -> None:
    with pytest.raises(UserError, match=r"rollout\.replicas is 0"):
        load_recipe("quickstart", {"cluster.address": "auto"})
    with pytest.raises(UserError, match=r"compare\.steps=2"):
        load_recipe("quickstart", {"cluster.address": "auto", "rollout.replicas": 2, "compare.steps": 2})
    words = {"cluster.address": "10.0.0.1:6379", "rollout.replicas": 2, "compare.steps": 0}
    assert load_recipe("quickstart", words).cluster.address == "10.0.0.1:6379"
    assert launcher_of(load_recipe("quickstart")) is None
    assert launcher_of(load_recipe("quickstart", words)) is not None


def test_ray_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray, which is not installed: pip install --editable '\.\[ray\]'"):
        cluster.connect(ClusterConfig(address="auto"), 1)


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'forerun[ray]'")
    with socket.create_server((LOOPBACK, 0)) as server:
        cluster.check_that_it_listens(address := f"{LOOPBACK}:{server.getsockname()[1]}")
    for there in (address, f"ray://{address}"):
        with pytest.raises(UserError, match=f"cluster.address={there}: no Ray cluster answers there .*refused"):
            cluster.connect(ClusterConfig(address=there), 1)
    cluster.check_that_it_listens("auto")


def test_folders_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a connection, in pieces that do not divide the files; empty files and folders in folders too."""
    monkeypatch.setattr(wire, "CHUNK_BYTES", 1000)
    contents = {"policy/a.bin": os.urandom(2500), "policy/sub/b.bin": b"", "policy/c": b"x" * 1000, "draft/d": b"12"}
    for name, content in contents.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    mine = tmp_path / "mine"
    files = {"policy": mine / "policy", "draft": mine / "draft", "weights.pt": mine / "policy" / "a.bin"}
    sent = list(cluster.files_in(files))
    here, there = Pipe()
    sender = Thread(target=lambda: [wire.send_file(here, path) for _, path in sent])
    sender.start()
    for name, path in sent:
        wire.receive_file(there, tmp_path / "theirs" / name, path.stat().st_size)
    sender.join()
    arrived = {str(p.relative_to(tmp_path / "theirs")): p.read_bytes()
               for p in (tmp_path / "theirs").rglob("*") if p.is_file()}  # fmt: skip
    assert arrived == contents | {"weights.pt": contents["policy/a.bin"]}


# ---- with Ray ----


@pytest.fixture(scope="module")
def ray() -> Any:
    """A private Ray of four CPUs (so Ray is told, whatever the machine has)."""
    module = pytest.importorskip("ray", reason="Ray is not installed: pip install 'forerun[ray]'")
    assert cluster.connect(ClusterConfig(address="local", cpus_per_replica=2), 2) is module
    return module


@pytest.fixture(scope="module")
def engine(ray: Any, small: Policy) -> Iterator[ReplicatedEngine]:
    """Two actors of a private Ray, with a pause before each round."""
    made = start(small, ClusterConfig(address="local", cpus_per_replica=1), 2, "faulty_engines:slow")
    yield made
    made.close()


@pytest.mark.slow
def test_actors_sample_what_one_process_does(engine: ReplicatedEngine, small: Policy) -> None:
    engine.load(pack_weights(3, small, NgramDrafter(block().ngram), shared=False))
    found = list(engine.stream(PROMPTS, GREEDY, N))
    assert by_place(found) == expected(small) and {v for r in found for v in r.versions} == {3}
    assert os.getpid() not in engine.pids and len(set(engine.pids)) == 2 and engine.metrics()["replicas"]["lost"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [(signal.SIGKILL, "lost by the cluster"), (signal.SIGSTOP, "silent")])
def test_an_actor_lost_in_a_stream_is_replaced(
    engine: ReplicatedEngine, small: Policy, how: signal.Signals, words: str
) -> None:
    before, lost = set(engine.pids), engine.lost
    engine.warnings.clear()
    engine.load(pack_weights(7, small, NgramDrafter(block().ngram), shared=False))
    stream = engine.stream(PROMPTS, GREEDY, N)
    found = [next(stream)]
    victim = engine.pids[1]
    os.kill(victim, how)
    found += list(stream)
    assert by_place(found) == expected(small) and {v for r in found for v in r.versions} == {7}
    assert engine.lost == lost + 1 and len(engine.warnings) == 1 and words in engine.warnings[0]
    assert "common causes" not in engine.warnings[0]  # what Ray says of any loss
    assert len(set(engine.pids) - before) == 1 and victim not in engine.pids


@pytest.mark.slow
def test_an_actor_makes_its_engine_of_what_it_was_sent(ray: Any, engine: ReplicatedEngine, small: Policy) -> None:
    """The maker refuses and names its folder: one that is swept when it is killed, and not the driver's own."""
    settings = ClusterConfig(address="local", cpus_per_replica=0.5)
    with pytest.raises(UserError, match=r"made from /.*/forerun-scratch-.*/policy with .*config\.json") as told:
        start(small, settings, 1, "faulty_engines:refusing_with_its_files")
    assert str(engine._spec.files["policy"]) not in str(told.value)


@pytest.mark.slow
def test_replicas_that_do_not_fit_are_told(ray: Any, engine: ReplicatedEngine, small: Policy) -> None:
    """Two of the four CPUs are taken."""
    launcher = cluster.RayLauncher(ClusterConfig(address="local", cpus_per_replica=3), "replica", 1, 1)
    with pytest.raises(UserError, match="was not placed in 3 s: it needs 3 CPUs and 0 GPUs, and the cluster has 2"):
        ReplicatedEngine("local", small, None, SpeculationConfig(), slots=1, replicas=1, launcher=launcher,
                         timeouts=Timeouts(start_s=3.0))  # fmt: skip


def test_an_engine_of_this_process_needs_no_launcher(small: Policy) -> None:
    assert isinstance(build_engine(RolloutConfig(slots=2), small, None, SpeculationConfig()), LocalEngine)


@pytest.mark.slow
def test_a_run_on_a_cluster_is_the_run_of_one_process(ray: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The command's own way in: the recipe's `cluster:` block, over two steps."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "runs": str(tmp_path / "runs"), "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl")},
        "rollout": {"slots": 1, "max_new_tokens": 8},
        "train": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 3, "learning_rate": 1e-3},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    there = forerun.train(str(tmp_path / "recipe.yaml"), {"cluster.address": "local", "rollout.replicas": 2})
    here = forerun.train(str(tmp_path / "recipe.yaml"))
    assert there["steps"] == 2 and there["warnings"] == here["warnings"]
    texts = [[json.loads(line)["text"] for line in Path(r["paths"]["rollouts"]).read_text().splitlines()][:6]
             for r in (there, here)]  # fmt: skip
    assert len(texts[0]) == 6 and texts[0] == texts[1]  # of the first step; the actor has threads of its own
    mine, other = (load_policy(r["paths"]["policy"], "float32", "cpu").model.state_dict() for r in (there, here))
    assert max(float((mine[name] - other[name]).abs().max()) for name in mine) < 1e-4


@pytest.mark.slow
def test_a_machine_that_goes_away_is_survived(ray: Any, engine: ReplicatedEngine, small: Policy) -> None:
    """Three machines simulated on one; the one that holds the replica is taken away in mid-stream."""
    from ray.cluster_utils import Cluster

    engine.close()
    ray.shutdown()
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [machines.add_node(num_cpus=1) for _ in range(2)]
    try:
        settings = ClusterConfig(address=machines.address, placement="SPREAD")
        with closing(start(small, settings, 1, "faulty_engines:slow")) as alone:
            stream = alone.stream(PROMPTS, GREEDY, N)
            found = [next(stream)]
            place = alone._replicas[0].worker.process.node  # type: ignore[attr-defined]
            machines.remove_node(next(n for n in nodes if n.node_id == place), allow_graceful=False)
            found += list(stream)
            assert by_place(found) == expected(small) and alone.lost >= 1
    finally:
        ray.shutdown()
        machines.shutdown()
