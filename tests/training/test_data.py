"""A run's problems: those that fit the model, known from its tokenizer alone, with what is left out told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forerun
from forerun.config import Recipe, load_recipe
from forerun.errors import UserError
from forerun.events import Warned
from forerun.training import data
from forerun.training.data import load_data, prepare_data
from tiny_models import save_tiny

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}<a>"
)


def rows(*lengths: int) -> list[dict[str, Any]]:
    return [{"question": f"{i:02d}".ljust(length, "x"), "answer": i} for i, length in enumerate(lengths)]


def recipe_on(folder: Path, model: Path, content: list[dict[str, Any]], **overrides: Any) -> Recipe:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in content))
    settings = {"task.name": "jsonl", "task.path": str(path), "policy.model": str(model), "policy.adapter": None}
    settings |= {"speculation": {"method": "none"}, "policy.system": None, "compare.steps": 0}
    return load_recipe("quickstart", settings | overrides)


def test_prompts_that_fill_the_context_are_left_out_and_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The tiny template adds 6 tokens, one per character: <u> and <a>. The context has 128 positions."""
    content = rows(*[10] * 20, 121, 122, 400)
    recipe = recipe_on(tmp_path, tiny("llama"), content)
    events = list(prepare_data(recipe))
    loaded = load_data(recipe)
    assert len(loaded.splits.train) == 19 and len(loaded.splits.held_out) == 2  # 121 + 6 leaves one free position
    assert loaded.splits.dropped == {"too_long": 2} and events == [Warned(text) for text in loaded.warnings]
    assert loaded.warnings == ["2 problems are left out: their prompts fill the model's context of 128 tokens "
                               "('data/22' has 406)"]  # fmt: skip
    assert loaded.task.problems("train") == loaded.splits.train
    with pytest.raises(UserError, match=r"2 prompts fill .*task.too_long=drop"):
        load_data(recipe_on(tmp_path, tiny("llama"), content, **{"task.too_long": "error"}))
    none = load_data(recipe_on(tmp_path, tiny("llama"), rows(*[200] * 9, 10)))
    with pytest.raises(UserError, match="No training problem is left: 9 fill the model's context"):
        none.task.problems("train")
    assert len(none.task.problems("eval")) == 1  # enough for `forerun verify`


def test_only_the_tokenizer_is_loaded(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert load_data(recipe_on(tmp_path, tmp_path / "model", rows(*[10] * 20))).context == 128
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_data(recipe_on(tmp_path, tmp_path / "model", rows(*[10] * 20)))


def test_a_bound_spares_encoding_what_must_fit(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = data.encode_problem
    monkeypatch.setattr(data, "encode_problem", lambda p, e: encoded.append(p.id) or original(p, e))
    load_data(recipe_on(tmp_path, tiny("llama"), rows(*[10] * 20, 100)))
    assert encoded == ["data/0", "data/20"]


def test_what_the_template_does_with_the_system_message_is_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", template=NO_SYSTEM)
    loaded = load_data(recipe_on(tmp_path, model, rows(*[10] * 20), **{"policy.system": "be brief"}))
    assert ["takes no system message" in text for text in loaded.warnings] == [True]
    unused = {"policy.system": "be brief", "policy.chat": False}
    assert "policy.system is not used" in load_data(recipe_on(tmp_path, model, rows(*[10] * 20), **unused)).warnings[0]
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    content = [*rows(*[10] * 19), {"prompt": [{"role": "system", "content": "own"}, *turns], "answer": "1"}]
    loaded = load_data(recipe_on(tmp_path, tiny("llama"), content))
    assert loaded.encoder.render(loaded.splits.held_out[1].prompt).text == "<s>own<u>1<a>2<u>3<a>"
    with pytest.raises(UserError, match=r"Problem 'data/19': .*has 4 messages"):
        load_data(recipe_on(tmp_path, tiny("llama"), content, **{"policy.chat": False}))


def test_a_run_goes_round_long_prompts_and_its_summary_says_so(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_on(tmp_path, tiny("llama"), [*rows(*[10] * 11, 300), *rows(*[10] * 11, 300)])
    (tmp_path / "own.yaml").write_text(recipe.to_yaml())
    overrides = {"runs": str(tmp_path), "train.steps": 2, "train.prompts_per_step": 2, "train.samples_per_prompt": 2}
    overrides |= {"rollout.max_new_tokens": 4, "eval.prompts": 2, "checkpoint.every": 1}
    summary = forerun.train(str(tmp_path / "own.yaml"), overrides)
    assert summary["steps"] == 2
    assert [text.split(" problems")[0] for text in summary["warnings"][:2]] == ["12 of 24", "1"]
