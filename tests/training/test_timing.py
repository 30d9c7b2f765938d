"""Traces of whole runs on a tiny model: they agree with the metrics, and show overlap where there is some."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import faulty_engines
import forerun
from forerun.config import SpeculationConfig
from forerun.engine import Sampling
from forerun.engine.replicated import ReplicatedEngine
from forerun.events import finish
from forerun.models import load_policy
from forerun.tracking.timeline import LEARNER, QUEUE, Event, Timeline, read_timeline
from forerun.training.run import resumed_recipe, run
from forerun.training.timing import EngineStates
from forerun.training.weights import pack_weights
from forerun.types import STAGES
from tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(autouse=True)
def rewards_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Runs of a tiny model on twenty sums, without a drafter."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data: dict[str, Any] = {
        "name": "tiny",
        "runs": str(tmp_path / "runs"),
        "policy": {"model": str(save_tiny(tmp_path / "llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "none"},
        "rollout": {"slots": 8, "max_new_tokens": 12},
        "train": {"steps": 3, "prompts_per_step": 3, "samples_per_prompt": 4, "learning_rate": 1e-3},
        "eval": {"every": 2, "prompts": 2},
        "compare": {"steps": 0},
        "checkpoint": {"every": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "tiny.yaml"


def trained(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "time/step" in row]


def lane(folder: Path, name: str) -> list[Event]:
    found = [e for e in read_timeline(folder / "timeline.json")[0] if e.lane == name and e.seconds is not None]
    return sorted(found, key=lambda e: e.start_s)


def end(event: Event) -> float:
    assert event.seconds is not None
    return event.start_s + event.seconds


def check_lanes(folder: Path) -> None:
    """The file is JSON, no two spans of a lane share time, and stages are those of the metrics to the nanosecond."""
    json.loads((folder / "timeline.json").read_text())
    events, broken = read_timeline(folder / "timeline.json")
    assert broken == 0
    for name in {e.lane for e in events}:
        spans = lane(folder, name)
        assert all(end(a) <= b.start_s + 2e-9 for a, b in pairwise(spans)), name
    learner = lane(folder, LEARNER)
    for row in trained(folder):
        for stage in STAGES:
            seconds = sum(e.seconds or 0 for e in learner if (e.name, e.step) == (stage, row["step"]))
            assert seconds == pytest.approx(row[f"time/{stage}"], abs=1e-8), (stage, row["step"])
        assert -1e-9 <= row["time/engine_idle"] <= row["time/step"]


def together_s(folder: Path, engine: str) -> float:
    """Seconds in which the engine generated while the learner computed."""
    busy = [e for e in lane(folder, engine) if e.name == "generate"]
    learning = [e for e in lane(folder, LEARNER) if e.name in ("logprob", "train")]
    return sum(max(0.0, min(end(a), end(b)) - max(a.start_s, b.start_s)) for a in busy for b in learning)


def counts(folder: Path, name: str) -> list[float]:
    events = json.loads((folder / "timeline.json").read_text())
    return [e["args"][name] for e in events if e["ph"] == "C" and e["name"] == name]


def test_a_synchronous_run_takes_turns(recipe: Path) -> None:
    words = {"speculation.method": "ngram", "speculation.k": 2, "compare.steps": 1}
    summary = forerun.train(str(recipe), words)
    folder = Path(summary["run"])
    check_lanes(folder)
    assert together_s(folder, "engine") == 0.0
    learner, engine = lane(folder, LEARNER), lane(folder, "engine")
    for name, steps in (("evaluation", [0, 2, 3]), ("compare", [1]), ("checkpoint", [1, 2, 3]), ("train", [1, 2, 3])):
        assert [e.step for e in learner if e.name == name] == steps, name
    assert [(e.step, e.version) for e in engine if e.name == "generate"] == [(1, 0), (2, 1), (3, 2)]
    assert [(e.step, e.version) for e in engine if e.name == "evaluate"] == [(0, 0), (2, 2), (3, 3)]
    for row in trained(folder):
        inside = sum(row[f"time/{s}"] for s in ("data", "logprob", "train"))
        assert inside * 0.99 <= row["time/engine_idle"] <= inside + row["time/prepare"] + row["time/generation"]
        generated = next(e for e in engine if (e.name, e.step) == ("generate", row["step"]))
        waited = next(e for e in learner if (e.name, e.step) == ("generation", row["step"]))
        assert waited.start_s <= generated.start_s and end(generated) <= end(waited)
        assert not any(name.startswith("async/") for name in row)
    assert set(summary["overlap"]) == {"learner_idle", "engine_idle"}
    assert all(0 < share < 1 for share in summary["overlap"].values())
    assert max(counts(folder, "samples in flight")) <= 12 and counts(folder, QUEUE) == []
    page = (folder / "report.html").read_text()
    assert [n for n in ("gantt", "idle", "queue", "lag") if f'data-figure="{n}"' in page] == ["gantt", "idle"]


def test_a_resumed_run_has_every_step_once(recipe: Path) -> None:
    folder = Path(forerun.train(str(recipe), {"train.steps": 3, "checkpoint.every": 2})["run"])
    text = (folder / "timeline.json").read_text()
    (folder / "timeline.json").write_text(text[:-40])  # cut off in the middle of a line
    clock_s = max(end(e) for e in lane(folder, LEARNER) if e.step <= 2)
    finish(run(resumed_recipe(folder, {"train.steps": 4}), resume=folder))
    check_lanes(folder)
    learner = lane(folder, LEARNER)
    for stage in STAGES:
        assert [e.step for e in learner if e.name == stage] == [1, 2, 3, 4], stage
    assert [e.step for e in lane(folder, "engine") if e.name == "generate"] == [1, 2, 3, 4]
    assert next(e for e in learner if e.step == 3).start_s >= clock_s


@pytest.mark.slow
def test_generation_ahead_shows_as_overlap(recipe: Path) -> None:
    words = {"loop.lag": 1, "rollout.replicas": 2, "train.steps": 5, "rollout.max_new_tokens": 60, "eval.every": 0}
    summary = forerun.train(str(recipe), words)
    folder = Path(summary["run"])
    check_lanes(folder)
    assert together_s(folder, "replica 0") > 0 and together_s(folder, "replica 1") > 0
    for name in ("replica 0", "replica 1"):
        generated = [e for e in lane(folder, name) if e.name == "generate"]
        assert [e.step for e in generated] == [1, 2, 3, 4, 5]
        assert all(e.version is not None and e.step - 2 <= e.version <= e.step - 1 for e in generated)
    rows = trained(folder)
    for row in rows:
        assert row["async/trainer_idle"] == pytest.approx(row["time/exposed_generation"] / row["time/step"])
        assert row["async/engine_idle"] == pytest.approx(row["time/engine_idle"] / row["time/step"])
        by_lag = [row.get(f"async/lag_tokens_{lag}", 0.0) for lag in (0, 1)]
        assert sum(by_lag) == row["perf/gen_tokens"] and by_lag[1] / sum(by_lag) == pytest.approx(row["async/lag_mean"])
    assert set(summary["overlap"]) == {"learner_idle", "engine_idle", "steps_waiting"}
    assert max(counts(folder, QUEUE)) >= 1 and counts(folder, QUEUE)[-1] == 0
    page = (folder / "report.html").read_text()
    assert all(f'data-figure="{n}"' in page for n in ("gantt", "idle", "queue", "lag"))


@pytest.mark.slow
def test_a_lost_replica_is_marked_and_starts_again(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(faulty_engines.__file__).parent), prepend=os.pathsep)
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    plain = SpeculationConfig.model_validate({"method": "none"})
    within = ReplicatedEngine("local", policy, None, plain, slots=2, replicas=2, make="faulty_engines:slow")
    timeline = Timeline(tmp_path / "timeline.json")
    with closing(within):
        states = EngineStates(within, timeline)
        within.load(pack_weights(3, policy, None, shared=False))
        states.begin("generate", 4)
        stream = within.stream([[5, 6, 7], [9, 3]], Sampling(40, ignore_eos=True), 4)
        found = [next(stream)]
        os.kill(within.pids[1], signal.SIGKILL)
        assert len(found + list(stream)) == 8
    timeline.close()
    marks = [(e.lane, e.name) for e in read_timeline(timeline.path)[0] if e.seconds is None]
    assert marks == [("replica 1", "lost")]
    names = {name: [e.name for e in lane(tmp_path, name) if e.name != "idle"] for name in ("replica 0", "replica 1")}
    assert names == {"replica 0": ["load", "generate"], "replica 1": ["load", "generate", "start", "load", "generate"]}
    spans = lane(tmp_path, "replica 1")
    assert all(end(a) <= b.start_s + 2e-9 for a, b in pairwise(spans))
    assert {(e.step, e.version) for e in spans if e.name in ("load", "generate")} == {(4, 3)}


@pytest.mark.slow
def test_versions_in_flight_cut_what_a_replica_does(recipe: Path) -> None:
    words = {"loop.lag": 1, "loop.in_flight": True, "rollout.replicas": 1, "train.steps": 5, "eval.every": 0}
    folder = Path(forerun.train(str(recipe), words | {"rollout.max_new_tokens": 60})["run"])
    check_lanes(folder)
    states = [e for e in lane(folder, "replica 0") if e.name in ("load", "generate")]
    for before, after in pairwise(states):
        if before.name == "load" and after.name == "generate":
            assert after.version == before.version
    assert {e.step for e in states if e.name == "generate"} == {1, 2, 3, 4, 5}
