"""One run that is killed twenty times, driver, replicas and ranks, and ends where an undisturbed run ends.

Engines decode one sequence at a time, and a checkpoint is gone on from by as many ranks as wrote it: nothing rounds
otherwise than in the undisturbed run, and the ends are compared bit for bit. What a lost replica had counted of samples
that it did not deliver stays counted (it was done), so that counters of rounds are left out.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kill_driver import POINTS, STAGES
from kill_runs import Zygote, beginning, faults, latest, lines, write_recipe

from forerun.learner.checkpoint import newest_checkpoint
from forerun.models.checksum import checksum

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
    made = Zygote(tmp_path, spares=12)
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
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="who lives is seen in /proc, which is Linux's")
def test_twenty_kills_at_random_points(tiny: Callable[..., Path], zygote: Zygote, tmp_path: Path) -> None:
    """All is accounted for, the end is the undisturbed run's, and nobody is left."""
    recipe, plan = write_recipe(tmp_path, tiny("llama"), **RECIPE), drawn(SEED)
    folder = zygote.lives_in_turn(recipe, [], plan)

    struck = zygote.struck
    assert [{k: s[k] for k in ("who", "point", "which", "step")} for s in struck] == plan
    assert Counter(s["who"] for s in struck) == KILLS and len({s["pid"] for s in struck}) == 20
    assert all(s["at"] >= s["step"] for s in struck)
    zygote.wait_until_alone()

    assert faults(folder) == []
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == summary["weights"]["version"] == STEPS
    check_that_transformers_loads(newest_checkpoint(folder), summary)

    assert zygote.live(beginning(recipe, [], 0)) == 0, zygote.said
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
