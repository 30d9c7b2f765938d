"""`forerun data`: the task as the model sees it, without its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from command_line import run_here
from pages import Page


def test_counts_lengths_prompts_and_what_is_left_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The tiny template: one token per character, <s>be<u>...<a>."""
    model, path, page = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "page.html"
    shutil.copytree(tiny("llama"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [{"question": f"<b>{i}</b> &", "answer": i / 8} for i in range(20)]
    rows += [rows[0], {"question": "7" * 200, "answer": 1}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    words = ["data", "quickstart", f"policy.model={model}", "policy.adapter=null", "speculation.method=none"]
    words += ["policy.system=be", "task.name=jsonl", f"task.path={path}", "rollout.max_new_tokens=100", f"--out={page}"]
    done = run_here(*words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["train"], found["eval"], found["duplicates"], found["in_both"]) == (18, 2, 1, 0)
    assert found["dropped"] == {"duplicate": 1, "too_long": 1} and len(found["warnings"]) == 2
    assert found["prompts"] == [f"<s>be<u><b>{i}</b> &<a>" for i in range(3)]
    assert found["answers"] == ["0.0", "0.125", "0.25"]
    lengths = found["lengths"]
    assert (lengths["min"], lengths["max"], lengths["context"], lengths["crowded"]) == (21, 22, 128, 0)
    assert sum(entry["count"] for entry in lengths["histogram"]) == 20
    text = Page(page).words
    assert found["paths"]["page"] == str(page)
    assert "<s>be<u><b>0</b> &<a>" in text and "fill the model's context" in text
    shown = run_here(*words).stdout
    assert "<s>be<u><b>0</b> &<a>" in shown and f"page {page}" in shown and "repeat another question" in shown


def test_prompts_that_are_all_too_long_are_one_sentence(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i}" * 500, "answer": 1}) for i in range(1, 4)))
    words = ["data", "quickstart", f"policy.model={tiny('llama')}", "policy.adapter=null", "speculation.method=none"]
    done = run_here(*words, "task.name=jsonl", f"task.path={path}")
    assert done.returncode == 2 and "No training problem is left: 3 fill the model's context" in done.stderr


def test_a_mistake_in_the_data_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "q", "target": "1"}))
    done = run_here("data", "quickstart", "task.name=jsonl", f"task.path={path}", "--json")
    assert done.returncode == 2 and done.stdout == "" and "its columns are question, target" in done.stderr
    assert done.stderr.startswith("forerun: ") and done.stderr.count("\n") == 1
