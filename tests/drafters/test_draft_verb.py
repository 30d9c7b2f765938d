"""`forerun draft`: a drafter from a recipe, broken off and gone on with; texts in place of samples."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from forerun.config import Recipe, SpeculationConfig, load_recipe
from forerun.drafters import load_drafter
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.report.console import Console, follow
from forerun.tasks import Problem
from forerun.training.drafter import make_drafter, read_texts, text_pairs
from forerun.training.prompts import encode
from tiny_models import ALPHABET, save_tiny


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b), "solution": f"{a + b}"} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "name": "tiny",
        "policy": {"model": str(save_tiny(tmp_path / "policy")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl")},
        "speculation": {"method": "eagle3", "k": 3},
        "draft": {"rollouts": 32, "epochs": 3, "depth": 2, "vocab": 30, "batch_tokens": 128},
        "rollout": {"slots": 8, "max_new_tokens": 12},
        "train": {"samples_per_prompt": 4},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


class Killed(Console):
    """Ends the run when a line holds `phrase`."""

    def __init__(self, phrase: str) -> None:
        super().__init__(0)
        self.phrase = phrase

    def note(self, text: str) -> None:
        super().note(text)
        if self.phrase in text:
            raise KeyboardInterrupt


def made(recipe: Recipe, out: Path, resume: bool = False, stop: str | None = None) -> dict[str, object]:
    return follow(make_drafter(recipe, out, resume), Killed(stop) if stop else Console(0))


def test_forerun_draft_goes_on_where_it_was_broken_off(recipe: Path, tmp_path: Path) -> None:
    settings, out = load_recipe(str(recipe)), tmp_path / "head"
    about = made(settings, tmp_path / "whole")
    with pytest.raises(UserError, match="holds no unfinished training to go on with; leave out --resume"):
        made(settings, out, resume=True)
    with pytest.raises(KeyboardInterrupt):
        made(settings, out, stop="epoch 2/3")
    assert {p.name for p in (out / "training").iterdir()} == {"settings.json", "pairs.jsonl", "state.pt"}
    with pytest.raises(UserError, match=r"holds an unfinished training: go on with --resume, or remove .*training"):
        made(settings, out)
    other = load_recipe(str(recipe), {"draft.epochs": 2})
    with pytest.raises(UserError, match=r"has draft\.epochs=3 and this recipe draft\.epochs=2; give the same"):
        made(other, out, resume=True)
    save_tiny(tmp_path / "policy", seed=1)
    with pytest.raises(UserError, match=r"is of a policy with checksum [0-9a-f]{16} and '.*' now has [0-9a-f]{16};"):
        made(settings, out, resume=True)
    save_tiny(tmp_path / "policy")
    noted = (out / "training" / "settings.json").read_text()
    (out / "training" / "settings.json").write_text(noted[:40])
    with pytest.raises(UserError, match=r"settings\.json is broken: .*; remove .*training to start again"):
        made(settings, out, resume=True)
    (out / "training" / "settings.json").write_text(noted)
    assert made(settings, out, resume=True) == about
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert "training" not in {p.name for p in out.iterdir()}
    (out / "training").mkdir()  # killed while it was being removed: without settings it is nothing to go on from
    (out / "training" / "pairs.jsonl").write_text('{"prompt": [1], "completion": [2]}')
    (out / "training" / "state.pt").write_text("old")
    assert made(load_recipe(str(recipe), {"draft.epochs": 1}), out)["rollouts"] == 32  # made anew over a finished one
    assert (out / "model.safetensors").read_bytes() != (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_cold_start_is_not_made_again(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, out = load_recipe(str(recipe), {"cold_start": {"steps": 2, "batch": 4}}), tmp_path / "head"
    about = made(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(settings, out, stop="epoch 0/3")

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("forerun.learner.sft.train_adapter", never)
    monkeypatch.setattr("forerun.training.drafter.sample_policy", never)
    assert made(settings, out, resume=True) == about
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_recipe_without_a_drafter_leaves_nothing_behind(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no drafter to train"):
        made(load_recipe(str(recipe), {"speculation.method": "ngram"}), tmp_path / "head")
    assert not (tmp_path / "head").exists()


@pytest.mark.slow
def test_kill_and_resume_on_the_command_line(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL after the first epoch; the drafter is that of an undisturbed training, bit for bit."""
    changes, out = {"draft.epochs": 60, "draft.patience": 60}, tmp_path / "head"
    command = [sys.executable, "-m", "forerun.cli", "draft", str(recipe), *[f"{k}={v}" for k, v in changes.items()]]
    command, environment = [*command, "--out", str(out), "--json"], {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "training" / "state.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "training" / "state.pt").exists() and not (out / "model.safetensors").exists()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made(load_recipe(str(recipe), changes), tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert json.loads(done.stdout)["tokens_per_round"] >= 1 and not (out / "training").exists()


# ---- texts ----


def test_texts_become_pairs(recipe: Path, tmp_path: Path, policy: Policy) -> None:
    settings, path = load_recipe(str(recipe), {"policy.system": "be brief"}), tmp_path / "texts.jsonl"
    rows = [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "a", "completion": "b</s>"},
        {"text": "hello world"},
        {"text": "x" * 300, "source": "web"},
        {"prompt": "p", "completion": "y" * 300},
        {"prompt": "p" * 300, "completion": "left out"},
    ]
    path.write_text("\n\n".join(json.dumps(r) for r in rows))
    pairs, cut = text_pairs(str(path), settings, policy)
    decode = policy.tokenizer.decode
    wanted = encode(Problem("0", "1+1=", ""), settings, policy)
    assert pairs[0] == (wanted, [*policy.tokenizer("2")["input_ids"], 0]) and "be brief" in decode(pairs[0][0])
    assert pairs[1][1][-1] == 0 and pairs[1][1].count(0) == 1
    assert decode(pairs[2][0]) == "h" and decode(pairs[2][1]) == "ello world"
    assert cut == 2 and [len(p) + len(c) for p, c in pairs[3:]] == [128, 128] and policy.context == 128


def test_faulty_texts_are_refused(recipe: Path, tmp_path: Path, policy: Policy) -> None:
    path, settings = tmp_path / "texts.jsonl", load_recipe(str(recipe))
    with pytest.raises(UserError, match=r"Cannot read the data file .*texts\.jsonl: No such file"):
        read_texts(str(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_texts(str(path))
    path.write_text('{"text": "abc"}\n\n{"text": \n')
    with pytest.raises(UserError, match=r"Line 3 of .*texts\.jsonl is not JSON"):
        read_texts(str(path))
    path.write_text('{"text": "abc"}\n{"prompt": "a", "completion": 3}\n')
    with pytest.raises(UserError, match=r"Object 2 of .* has neither strings under 'prompt' and 'completion' nor"):
        read_texts(str(path))
    path.write_text('{"text": "ab"}\n')
    with pytest.raises(UserError, match=r"Object 1 of .* has 2 tokens; a text needs at least 3"):
        text_pairs(str(path), settings, policy)
    path.write_text(json.dumps({"prompt": "a" * 200, "completion": "b"}))
    with pytest.raises(UserError, match=r"All prompts of .* fill the policy's context of 128 positions"):
        text_pairs(str(path), settings, policy)
    broken = load_recipe(str(recipe), {"draft.texts": str(path)})
    with pytest.raises(UserError, match="context"):
        made(broken, tmp_path / "head")
    assert not (tmp_path / "head" / "training").exists()  # nothing to go on from: mend the file and start again


class Listening(Console):
    """Keeps the lines that were printed."""

    def __init__(self) -> None:
        super().__init__(0)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("method", ["eagle3", "mtp", "model"])
def test_a_drafter_learns_from_texts(recipe: Path, tmp_path: Path, method: str) -> None:
    """Texts that the policy did not write; its own distribution on them is the training target."""
    path, rng = tmp_path / "texts.jsonl", random.Random(0)
    rows = [{"text": "".join(rng.choices(ALPHABET[1:], k=30))} for _ in range(100)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    changes = {"draft.texts": str(path), "draft.learning_rate": 3e-3, "draft.vocab": 60, "speculation.method": method}
    settings = load_recipe(str(recipe), changes | ({"draft.layers": [0, 3]} if method == "model" else {}))
    console = Listening()
    about = follow(make_drafter(settings, tmp_path / "head"), console)
    assert about["rollouts"] == 100 and about["tokens"] == 100 * 29
    assert json.loads((tmp_path / "head" / "config.json").read_text())["forerun"]["training"]["texts"] == str(path)
    lengths = [
        float(x) for line in console.lines for x in re.findall(r"epoch \d/3: .* ([\d.]+) tokens per round", line)
    ]
    assert len(lengths) == 4 and about["tokens_per_round"] == pytest.approx(max(lengths), abs=0.006)
    assert max(lengths) > lengths[0] + 0.05, lengths
    policy = load_policy(settings.policy.model, "float32", "cpu")
    drafter = load_drafter(policy, SpeculationConfig(method=method, draft=str(tmp_path / "head")))  # type: ignore[arg-type]
    engine = LocalEngine(policy, drafter, k=3, slots=4)
    assert engine.generate([[5, 6, 7]], max_new_tokens=12) and engine.metrics()["drafted"] > 0
