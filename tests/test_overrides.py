"""Values of the command line: texts as typed, whatever they hold; mistakes are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_origin

import pytest

from forerun.config import Recipe, load_recipe, parse_overrides
from forerun.config.messages import known_keys
from forerun.config.overrides import _annotation, _kinds, read_value
from forerun.errors import UserError

NASTY = ("[INST] be brief", "a\nb: c: d", "42")
TYPED = (
    *NASTY, "Note: be: brief", "%brief", "[" * 3000,
    " leading blank", "trailing # sign", "#", "Answer: a number", "{be brief}", "*bold*", "@brief", "!tag x",
    '"Be" brief', "'", "`x`", "yes", "off", "1e3", "010", "1:30", "2024-13-45", "~", "", "=", "- a", "? b",
    "| c", "> d",
    "&e f", "\t", "é ∑ 漢", "[a, b]", "{}", "a=b", "\\n", "None", "true",
)  # fmt: skip


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("task.suffix= Finish with #### number: stop.", " Finish with #### number: stop."),
        ("policy.system=Note: be brief: no words", "Note: be brief: no words"), ("policy.system=yes", "yes"),
        ("policy.system=null", None), ("policy.system=", ""), ("task.path=/data/a b #2.jsonl", "/data/a b #2.jsonl"),
        ('rollout.stop=["###", "a: b"]', ["###", "a: b"]), ("rollout.stop=[42, yes, no]", ["42", "yes", "no"]),
        ("train.learning_rate=1e-6", 1e-6), ("name=2024", "2024"), ("train.steps=010", 10), ("train.packing=yes", True),
        ("train.betas=[0.8, 1e-1]", (0.8, 0.1)), ("eval.slots=null", None), ("draft.layers=[0, 1]", [0, 1]),
        ("speculation.draft_temperature=auto", "auto"), ("speculation.draft_temperature=0.5", 0.5),
        ("speculation.k=2", 2),
        ("speculation.train=off", "off"), ("train.lora.targets=all-linear", "all-linear"),
        ("train.lora.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]), ("policy.template.enable_thinking=false", False),
        ("task.options={seed: 7, name: a}", {"seed": 7, "name": "a"}), ("task.options.seed=7", 7), ("trackers=[]", []),
        ("checkpoint.every=5", 5),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_setting_wants_it(override: str, value: Any) -> None:
    recipe: Any = load_recipe("quickstart", parse_overrides([override]))
    for name in override.split("=")[0].split("."):
        recipe = recipe[name] if isinstance(recipe, dict) else getattr(recipe, name)
    assert recipe == value and type(recipe) is type(value)


def test_every_text_setting_takes_what_is_typed_and_no_setting_answers_with_a_traceback() -> None:
    settings = [key for key in known_keys(Recipe) if "." in key or key in ("name", "runs", "seed")]
    texts = [key for key in settings if str in _kinds(_annotation(Recipe, key))]
    assert {"task.suffix", "policy.system", "speculation.draft", "draft.texts", "cluster.address"} <= set(texts)
    for key in settings:
        kinds = _kinds(_annotation(Recipe, key))
        for typed in TYPED:
            if key in texts or all(get_origin(kind) is Literal for kind in kinds):
                assert read_value(Recipe, key, typed) == typed, key
        for typed in NASTY:
            try:
                load_recipe("quickstart", {key: typed})
            except UserError as error:
                assert "Traceback" not in str(error) and len(str(error).splitlines()) == 1, (key, typed, error)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.stop=[###]", "'rollout.stop': '[###]' is not YAML"), ("rollout.stop=###", "valid list (got '###')"),
        ("train.steps=1:30", "'train.steps': Input should be a valid integer"), ("policy.model=null", "valid string"),
        ("task.options={a: b: c}", "is not YAML"), ("task.options=2024-13-45", "is not YAML"),
        ("train.lora.targets=[q_proj", "is not YAML"), ("train.optimizer=adam", "'adamw' or 'sgd' (got 'adam')"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("quickstart", parse_overrides([override]))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("runs", "policy.model", "task.path", "task.eval_path", "speculation.draft", "draft.texts"):
        value: Any = load_recipe("quickstart", {key: "~/x"})
        for name in key.split("."):
            value = getattr(value, name)
        assert value == f"{tmp_path}/x", key
    (tmp_path / "own.yaml").write_text(load_recipe("quickstart").to_yaml())
    assert load_recipe("~/own.yaml").name == "quickstart"
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe("~/latin.yaml")
