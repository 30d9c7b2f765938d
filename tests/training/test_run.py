"""Whole runs on a tiny model: what they leave behind, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import forerun
from command_line import run_here
from forerun.errors import UserError
from forerun.events import finish
from signals import hear_signals
from tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A recipe of a tiny model on ten sums; its drafter is trained before step 1."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "tiny",
        "runs": str(tmp_path / "runs"),
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": "rewards_for_tests:has_digit"},
        "speculation": {"method": "eagle3", "k": 3},
        "draft": {"rollouts": 32, "epochs": 1, "depth": 2, "vocab": 30},
        "rollout": {"slots": 8, "max_new_tokens": 12},
        "train": {"steps": 4, "prompts_per_step": 3, "samples_per_prompt": 4, "learning_rate": 1e-3},
        "eval": {"every": 2, "prompts": 2},
        "compare": {"steps": 3},
        "checkpoint": {"every": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(autouse=True)
def rewards_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))


def lines(run: str | Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]


def steps_of(run: str | Path) -> list[dict[str, Any]]:
    return [row for row in lines(run) if "reward/mean" in row]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time/", "perf/", "compare/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "forerun.cli", *words]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def test_a_run_leaves_everything_behind(recipe: Path, tmp_path: Path) -> None:
    summary = forerun.train(str(recipe))
    run = Path(summary["run"])
    for name in ("metrics.jsonl", "rollouts.jsonl", "config.resolved.yaml", "env.json", "summary.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert (tmp_path / "runs" / "latest").resolve() == run.resolve()
    assert json.loads((run / "summary.json").read_text())["run"] == summary["run"]
    steps = [row for row in lines(run) if "reward/mean" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert len(summary["compare"]) == 3 and summary["speedup_generation"] > 0
    assert 1 <= summary["acceptance_length"] <= 4 and len(summary["acceptance_per_position"]) == 3
    assert set(summary["stage_seconds"]) == {"data", "prepare", "generation", "logprob", "train"}
    assert summary["in_force"] == {"engine": "local", "rule": "block"}
    assert summary["weights"]["version"] == 4 and summary["reward_end"] is not None
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(run / "hf" / "policy")
    assert saved.num_parameters() > 0
    engine = forerun.load_engine(
        "local", policy=str(run / "hf" / "policy"), dtype="float32",
        speculation={"method": "eagle3", "draft": str(run / "hf" / "drafter"), "k": 2, "verify": "token"},
    )  # fmt: skip
    assert len(engine.generate(["1+1="], n=3, max_new_tokens=4)) == 3


def test_the_draft_verb_makes_a_drafter_that_loads(recipe: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "head"
    done = subprocess.run(
        command("draft", str(recipe), "--out", str(out), "--json"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said, config = json.loads(done.stdout), json.loads((out / "config.json").read_text())
    assert said["rollouts"] == 32 and config["forerun"]["tokens_per_round"] == said["tokens_per_round"] >= 1
    engine = forerun.load_engine(
        "local",
        policy=str(tiny("llama")),
        dtype="float32",
        speculation={"method": "eagle3", "draft": str(out), "k": 2, "verify": "block"},
    )
    assert engine.generate([[5, 6, 7]], max_new_tokens=8) and engine.metrics()["drafted"] > 0


@pytest.mark.parametrize("k", [1, 3])
def test_a_run_whose_drafts_are_all_accepted_ends_well(recipe: Path, tiny: Callable[..., Path], k: int) -> None:
    """It drafts with the policy itself, whose weights hardly move."""
    drafting = {"speculation.method": "model", "speculation.draft": str(tiny("llama")), "speculation.k": k}
    summary = forerun.train(str(recipe), {**drafting, "train.steps": 2, "train.learning_rate": 1e-12, "eval.every": 0})
    assert summary["acceptance_length"] > 1 + 0.9 * k
    assert (Path(summary["run"]) / "summary.json").exists() and (Path(summary["run"]) / "report.html").exists()


def test_the_policy_moves_and_the_versions_say_so(recipe: Path) -> None:
    summary = forerun.train(str(recipe), {"train.steps": 2, "compare.steps": 0})
    still = forerun.train(str(recipe), {"train.steps": 2, "compare.steps": 0, "train.learning_rate": 1e-12})
    assert summary["weights"]["policy_checksum"] != still["weights"]["policy_checksum"]
    assert summary["weights"]["draft_checksum"] == still["weights"]["draft_checksum"]


def test_an_evaluation_in_a_crowd_is_the_same_evaluation(recipe: Path) -> None:
    """Greedy, so that it is the text that is compared; plain decoding of three at once, and of the untrained policy."""
    changes = {"train.steps": 1, "compare.steps": 0, "eval.temperature": 0.0, "eval.prompts": 8}
    runs = [forerun.train(str(recipe), {**changes, "eval.slots": slots}) for slots in (None, 3)]
    own, crowd = ([row for row in without_times(lines(r["run"])) if "eval/reward" in row] for r in runs)
    assert len(own) == 2 and own == crowd and own[0]["eval/length"] > 1


def test_a_resumed_run_gives_the_same_metrics(recipe: Path) -> None:
    whole = forerun.train(str(recipe))
    half = forerun.train(str(recipe), {"train.steps": 2})
    from forerun.training.run import resumed_recipe, run

    continued = finish(run(resumed_recipe(Path(half["run"]), {"train.steps": 4}), resume=Path(half["run"])))
    assert continued["run"] == half["run"] and continued["steps"] == 4
    assert continued["weights"] == whole["weights"]

    def of_steps(folder: str) -> list[dict[str, Any]]:
        return [row for row in without_times(lines(folder)) if "reward/mean" in row]

    assert of_steps(continued["run"]) == of_steps(whole["run"])


@pytest.mark.slow
def test_a_killed_replica_costs_time_and_nothing_else(recipe: Path) -> None:
    """The engine in a process of its own is killed after step 1: every step has all its samples, of its version."""
    words = ["rollout.replicas=1", "rollout.max_new_tokens=40", "compare.steps=0", "rollout.temperature=0"]
    run = subprocess.Popen(command("train", str(recipe), *words, "--json"), env=environment(), stdout=subprocess.PIPE)
    runs = recipe.parent / "runs"
    metrics = runs / "latest" / "metrics.jsonl"
    wait_for(lambda: run.poll() is not None or (metrics.exists() and steps_of(runs / "latest") != []))
    tasks = Path(f"/proc/{run.pid}/task").glob("*/children")  # a thread of the launcher's has started them
    children = [pid for task in tasks for pid in task.read_text().split()]
    replicas = [p for p in children if "forerun.workers.server" in Path(f"/proc/{p}/cmdline").read_text()]
    os.kill(int(replicas[0]), signal.SIGKILL)
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and json.loads(out)["weights"]["version"] == 4
    steps = steps_of(runs / "latest")
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and steps[-1]["replicas/lost"] == 1
    assert sum(row["perf/gen_tokens"] > 0 for row in steps) == 4
    plain = forerun.train(str(recipe), dict(w.split("=") for w in words) | {"rollout.replicas": 0})
    texts, same = (
        [(r["step"], r["prompt_id"], r["text"]) for r in lines(r, "rollouts.jsonl")]
        for r in (runs / "latest", plain["run"])
    )
    assert len(texts) == len(same) == 4 * 12 and texts[:24] == same[:24]  # greedy, before an update's rounding can tell


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [False, True])
def test_generation_runs_ahead_by_the_lag(recipe: Path, in_flight: bool) -> None:
    words = {"loop.lag": 1, "loop.in_flight": in_flight, "rollout.replicas": 1, "compare.steps": 0, "train.steps": 6}
    summary = forerun.train(str(recipe), words | {"rollout.max_new_tokens": 60, "speculation.train": "every-1"})
    steps = steps_of(summary["run"])
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6] and summary["weights"]["version"] == 6
    assert steps[0]["async/lag_max"] == 0 and {row["async/lag_max"] for row in steps[1:]} <= {0, 1}
    assert max(row["async/lag_mean"] for row in steps) > 0
    assert (sum(row["async/mixed_rollouts"] for row in steps) > 0) <= in_flight
    for row in steps:
        assert row["time/exposed_generation"] <= row["time/step"]
        assert (row["async/kl"] >= 0) if row["async/lag_mean"] else ("async/kl" not in row)
    gaps = [row["mismatch/kl"] for row in steps if row["mismatch/kl"] is not None]
    limit = 0.05 if in_flight else 1e-6  # by one version; in flight its cache holds keys and values of older ones
    assert gaps and max(gaps) < limit
    assert max(row.get("async/kl", 0.0) for row in steps) > 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("real_workers")
def test_a_run_with_lag_is_resumed_behind_its_checkpoint(recipe: Path) -> None:
    from forerun.training.run import resumed_recipe, run

    words = {"loop.lag": 2, "rollout.replicas": 1, "compare.steps": 0}
    half = Path(forerun.train(str(recipe), words | {"train.steps": 2})["run"])
    summary = finish(run(resumed_recipe(half, {"train.steps": 5}), resume=half))
    steps = steps_of(half)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5] and summary["weights"]["version"] == 5
    assert steps[2]["async/lag_max"] == 0  # it starts with the checkpoint's version
    assert all(row["async/lag_max"] <= 2 for row in steps)


def test_lag_needs_engines_of_its_own(recipe: Path) -> None:
    for words, said in (
        ({"loop.lag": 1, "compare.steps": 0}, "rollout.replicas is 0"),
        ({"loop.lag": 1, "rollout.replicas": 1}, "compare.steps=3 needs it to itself"),
        ({"loop.in_flight": True}, "loop.lag=0 never does"),
    ):
        with pytest.raises(UserError, match=said):
            forerun.train(str(recipe), words)


@pytest.mark.slow
def test_kill_and_resume(recipe: Path) -> None:
    """SIGKILL in the middle of a step; then --resume on the command line; metrics as of an undisturbed run."""
    whole = forerun.train(str(recipe), {"train.steps": 6})
    process = subprocess.Popen(
        command("train", str(recipe), "train.steps=6"), env=environment(), stdout=subprocess.DEVNULL
    )
    runs = recipe.parent / "runs"
    wait_for(lambda: any(p.name == "step-000002" for p in runs.glob("*/checkpoints/*") if whole["run"] not in str(p)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        command("train", "--resume", str(runs / "latest"), "--json"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["run"] != whole["run"] and summary["steps"] == 6
    assert summary["weights"] == whole["weights"]
    pick = [row for row in without_times(lines(summary["run"])) if "reward/mean" in row]
    assert pick == [row for row in without_times(lines(whole["run"])) if "reward/mean" in row]


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_with_a_checkpoint(recipe: Path) -> None:
    process = subprocess.Popen(
        command("train", str(recipe), "train.steps=500", "checkpoint.every=0"), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals,
    )  # fmt: skip
    runs = recipe.parent / "runs"
    wait_for(lambda: any(len(lines(p.parent)) >= 3 for p in runs.glob("*/metrics.jsonl")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "forerun train --resume" in out + err and "Traceback" not in out + err
    from forerun.training.checkpoint import newest_checkpoint, read_history

    history = read_history(newest_checkpoint(runs / "latest"))
    assert history["step"] == lines(runs / "latest")[-1]["step"]
    done = subprocess.run(
        command("train", "--resume", str(runs / "latest"), f"train.steps={history['step'] + 1}"), env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_was_cut_off_is_not_used(recipe: Path) -> None:
    summary = forerun.train(str(recipe), {"train.steps": 2, "checkpoint.keep": 2})
    from forerun.training.checkpoint import newest_checkpoint

    checkpoints = Path(summary["run"]) / "checkpoints"
    (checkpoints / "step-000009.partial").mkdir()
    (checkpoints / "step-000007").mkdir()
    assert newest_checkpoint(Path(summary["run"])).name == "step-000002"
    (checkpoints / "step-000002" / "complete").unlink()
    assert newest_checkpoint(Path(summary["run"])).name == "step-000001"
    (checkpoints / "step-000001" / "complete").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest_checkpoint(Path(summary["run"]))


@pytest.mark.slow
def test_a_full_disk_loses_nothing(recipe: Path, tmp_path: Path) -> None:
    """A run folder on a file system of 2 MB: one sentence, and the checkpoint before is still whole."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        done = subprocess.run(
            command("train", str(recipe), f"runs={small}", "checkpoint.keep=5"),
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "checkpoint" in done.stderr and str(small) in done.stderr
        from forerun.training.checkpoint import complete_checkpoints

        found = complete_checkpoints(small / "latest" / "checkpoints")
        assert found and not list((small / "latest" / "checkpoints").glob("*.partial"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.model=/nowhere/model"], "policy.model=/nowhere/model: there is no such folder"),
        (["task.path=/nowhere/data.jsonl"], "task.path=/nowhere/data.jsonl: there is no such file"),
        (["task.reward=rewards_for_tests:raises"], "'raises' raised ZeroDivisionError: division by zero"),
        (["task.reward=rewards_for_tests:nothing"], "cannot import"),
        (["train.stepz=1"], "did you mean 'train.steps'"),
        (["speculation.draft=nowhere"], "speculation.draft=nowhere: there is no such folder"),
    ],
)
def test_bad_input_is_one_sentence(recipe: Path, overrides: list[str], words: str) -> None:
    if "raises" in words:  # once in a process of its own, with a model that is loaded
        train = command("train", str(recipe), *overrides)
        done = subprocess.run(train, env=environment(), capture_output=True, text=True)
    else:
        done = run_here("train", str(recipe), *overrides)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("forerun: ")


def test_bad_data_and_models(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        forerun.train(str(recipe), {"task.path": str(tmp_path / "empty.jsonl")})
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"question": f"{i}" * 300, "answer": "1"}) for i in range(20))
    )
    with pytest.raises(UserError, match="No training problem is left: 20 fill the model's context"):
        forerun.train(str(recipe), {"task.path": str(tmp_path / "long.jsonl"), "speculation.method": "none"})
    silent = save_tiny(tmp_path / "silent", template=None)
    with pytest.raises(UserError, match=r"no chat template; set policy\.chat=false"):
        forerun.train(str(recipe), {"policy.model": str(silent), "speculation.method": "none"})
    forerun.train(
        str(recipe), {"policy.model": str(silent), "policy.chat": False, "train.steps": 1, "speculation.method": "none"}
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.05)
