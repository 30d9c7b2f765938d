"""One run that is killed twenty times, driver, replicas and ranks, and ends where an undisturbed run ends.

Once with processes of one machine, once with Ray actors of a cluster that outlives its drivers. Engines decode one
sequence at a time, and a checkpoint is gone on from by as many ranks as wrote it: nothing rounds otherwise than in the
undisturbed run, and the ends are compared bit for bit. What a lost replica had counted of samples that it did not
deliver stays counted (it was done), so that counters of rounds are left out.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from forerun.models.checksum import checksum
from forerun.training.checkpoint import newest_checkpoint
from forerun.workers import scratch
from kill_driver import POINTS, STAGES, title
from kill_runs import Zygote, beginning, faults, latest, lines, marked, write_recipe
from private_ray import ray_cluster, ray_folder, ray_settings

SEED, STEPS = 7, 20
KILLS = {"replica": 7, "rank": 7, "driver": 6}
SURE = {  # the others are drawn
    "replica": ["rollouts", "training", "evaluation"],
    "rank": ["rollouts", "training", "sharding"],
    "driver": ["rollouts", "training", "writing"],
}
RECIPE: dict[str, dict[str, Any]] = {
    "speculation": {"train": "off"},
    "rollout": {"replicas": 2, "max_new_tokens": 6},
    "train": {"ranks": 2, "steps": STEPS},
    "eval": {"every": 3},
    "checkpoint": {"every": 2},
}
ACTOR = "ray::WorkerActor.run"  # what Ray calls the process of a replica or a rank
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="who lives is seen in /proc: Linux's")


def drawn(seed: int) -> list[dict[str, Any]]:
    """Twenty kills: who and where at random, about one per step, each in a step that has such a point or comes by one.

    No driver before the first checkpoint, without which its run cannot be resumed; one rank while a run is resumed.
    """
    draw, kills = random.Random(seed), []
    pools = {
        "replica": [*STAGES, "rollouts", "scoring", "training", "learnt", "checkpoint"],
        "rank": [*STAGES, "rollouts", "scoring", "training", "learnt", "checkpoint"],
        "driver": [*(p for p in POINTS if p != "finishing"), "scoring", "sharding", "evaluation"],
    }
    for who, count in KILLS.items():
        points = [*SURE[who], *draw.choices(pools[who], k=count - len(SURE[who]) - (who == "rank"))]
        kills += [{"who": who, "point": point, "which": draw.randrange(2)} for point in points]
    draw.shuffle(kills)
    for place, kill in enumerate(kills):
        step = place * (STEPS - 4) // len(kills)
        kill["step"] = max(2, step) if kill["who"] == "driver" else step
    resumed = draw.choice([place for place, kill in enumerate(kills) if kill["who"] == "driver"])
    kills.insert(resumed + 1, {"who": "rank", "point": "restoring", "which": draw.randrange(2), "step": 0})
    return kills


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    made = Zygote(tmp_path, forked=True)
    yield made
    made.close()


def told(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its times, and without what tells of the losses."""
    apart = ("time/", "perf/", "replicas/", "spec/")
    return [{k: v for k, v in row.items() if not k.startswith(apart)} for row in lines(folder / "metrics.jsonl")]


def weights_of(folder: Path) -> bytes:
    (file,) = (folder / "hf" / "policy").glob("*.safetensors")
    return file.read_bytes()


@pytest.mark.slow
@linux
def test_twenty_kills_at_random_points(tiny: Callable[..., Path], zygote: Zygote, tmp_path: Path) -> None:
    """All is accounted for, the end is the undisturbed run's, and nobody is left."""
    recipe, plan = write_recipe(tmp_path, tiny("llama"), **RECIPE), drawn(SEED)
    folder = zygote.lives_in_turn(recipe, [], plan)
    check_that_all_were_struck(zygote.struck, plan)
    zygote.wait_until_alone()
    check_that_nothing_is_missing(folder)
    check_that_it_is_the_undisturbed_run(folder, recipe, zygote)


@pytest.mark.slow
@pytest.mark.cluster
@linux
def test_twenty_kills_of_actors_and_their_driver(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kills. The cluster has room for one run alone: each life gets what the one before gave back.

    The undisturbed run is one of this machine, without Ray.
    """
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'forerun[ray]'")
    (there := tmp_path / "there").mkdir()
    recipe, plan = write_recipe(tmp_path, tiny("llama"), **RECIPE), drawn(SEED)
    with ray_settings(), ray_cluster(4, there) as address, closing(Zygote(tmp_path, limit_s=900)) as zygote:
        folder = zygote.lives_in_turn(recipe, [f"cluster.address={address}"], plan)
        check_that_all_were_struck(zygote.struck, plan)
        assert all(s["title"] == ACTOR for s in zygote.struck if s["who"] != "driver"), zygote.struck
        zygote.wait_until_alone()
        wait_until_actors_are_gone(f"RAY_TESTS_IN={there}")
        check_that_all_room_is_free(address)
        check_that_nothing_is_missing(folder)
        check_that_it_is_the_undisturbed_run(folder, recipe, zygote)
    assert marked(f"RAY_TESTS_IN={there}") == set()
    check_that_folders_are_swept(there, monkeypatch)


@pytest.mark.slow
@pytest.mark.cluster
@linux
def test_a_private_ray_ends_with_its_driver(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The resumed run begins a Ray of its own; the agents of the first one take most of a minute to give up."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'forerun[ray]'")
    recipe, plan = write_recipe(tmp_path, tiny("llama"), **RECIPE), [{"who": "driver", "point": "training", "step": 3}]
    with ray_settings(), ray_folder(), closing(Zygote(tmp_path)) as zygote:
        assert zygote.live(beginning(recipe, ["cluster.address=local"], 0), plan, in_turn=True) == -9, zygote.said
        wait_until_actors_are_gone(f"KILL_TESTS_IN={tmp_path}")
        assert zygote.live(beginning(recipe, [], 1)) == 0, zygote.said
        zygote.wait_until_alone(seconds=120)
        assert [s["point"] for s in zygote.struck] == ["training"]
        check_that_nothing_is_missing(folder := latest(recipe))
        check_that_it_is_the_undisturbed_run(folder, recipe, zygote)


def check_that_all_were_struck(struck: list[dict[str, Any]], plan: list[dict[str, Any]]) -> None:
    """As planned: everyone another process, and none too early."""
    assert [{k: s[k] for k in ("who", "point", "which", "step")} for s in struck] == plan
    assert Counter(s["who"] for s in struck) == KILLS and len({s["pid"] for s in struck}) == 20
    assert all(s["at"] >= s["step"] for s in struck)


def check_that_nothing_is_missing(folder: Path) -> None:
    """Steps, evaluations, samples, and a checkpoint that others can load."""
    assert faults(folder) == []
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == summary["weights"]["version"] == STEPS
    check_that_transformers_loads(newest_checkpoint(folder), summary)


def check_that_it_is_the_undisturbed_run(folder: Path, recipe: Path, zygote: Zygote) -> None:
    """Bit for bit."""
    assert zygote.live(beginning(recipe, [], 0)) == 0, zygote.said
    summary = json.loads((folder / "summary.json").read_text())
    whole = latest(recipe)
    assert whole != folder and told(folder) == told(whole)
    assert sum(row.get("policy/grad_norm", 0.0) > 0 for row in told(whole)) > STEPS / 2  # there was something to learn
    assert lines(folder / "rollouts.jsonl") == lines(whole / "rollouts.jsonl")
    assert summary["weights"] == json.loads((whole / "summary.json").read_text())["weights"]
    assert weights_of(folder) == weights_of(whole)


def check_that_transformers_loads(checkpoint: Path, summary: dict[str, Any]) -> None:
    """The policy of the last checkpoint, without us."""
    from transformers import AutoModelForCausalLM

    assert checkpoint.name == f"step-{STEPS:06d}"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint / "policy")
    assert checksum(loaded.state_dict()) == summary["weights"]["policy_checksum"]


ROOM = """
import json, logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
groups = {group["state"] for group in ray.util.placement_group_table().values()}
print(json.dumps([ray.cluster_resources()["CPU"], ray.available_resources().get("CPU", 0), sorted(groups)]))
"""


def wait_until_actors_are_gone(mark: str, seconds: float = 30.0) -> None:
    """Of those that carry a mark; Ray's own processes may live."""
    until = time.monotonic() + seconds
    while found := [words for pid in marked(mark) if "Actor" in (words := title(pid))]:
        assert time.monotonic() < until, found
        time.sleep(0.1)


def check_that_all_room_is_free(address: str) -> None:
    """What the actors of a cluster had reserved."""
    room = subprocess.run([sys.executable, "-c", ROOM, address], capture_output=True, text=True, timeout=120)
    assert room.returncode == 0, room.stderr
    assert json.loads(room.stdout) == [4.0, 4.0, ["REMOVED"]]


def check_that_folders_are_swept(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What killed actors held on disk is the next one's to remove."""
    monkeypatch.setattr(tempfile, "tempdir", str(there))
    monkeypatch.setattr(scratch, "YOUNG_S", -1.0)
    scratch.sweep()
    assert [path.name for path in there.iterdir()] == ["ray.txt"]
