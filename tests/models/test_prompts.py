"""Chat templates as published models have them: all of a prompt reaches the model, or a sentence says why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forerun
from forerun.errors import UserError
from forerun.models import load_policy
from forerun.models.prompts import PromptEncoder, load_tokenizer
from tiny_models import ALPHABET, TEMPLATE, tiny_tokenizer

HEAD = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}<a>"
PARTS = (
    "{% for m in messages %}<{{ m['role'][0] }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}<a>"
)
PARTS_WITHOUT_SYSTEM = REFUSES_SYSTEM.split("{% for")[0] + PARTS
THINKS = HEAD + "<a>{% if enable_thinking is defined and not enable_thinking %}<t></t>{% endif %}"


def encoder(template: str | None, **settings: Any) -> PromptEncoder:
    return PromptEncoder(tiny_tokenizer(ALPHABET, template), "tiny", **settings)


@pytest.mark.parametrize(
    ("template", "text", "noted"),
    [
        (TEMPLATE, "<s>be brief<u>1+1<a>", False), (REFUSES_SYSTEM, "<u>be brief\n\n1+1<a>", True),
        (DROPS_SYSTEM, "<u>be brief\n\n1+1<a>", True), (PARTS, "<s>be brief<u>1+1<a>", False),
        (PARTS_WITHOUT_SYSTEM, "<u>be brief\n\n1+1<a>", True), (HEAD.replace("'] }", "'] | trim }"), None, False),
    ],
)  # fmt: skip
def test_system_message_and_question_reach_the_model(template: str, text: str | None, noted: bool) -> None:
    rendered = encoder(template, system="be brief").render("1+1")
    assert text is None or rendered.text == text
    assert "1+1" in rendered.text and "be brief" in rendered.text
    assert (rendered.note is not None) == noted and (not noted or "no system message" in str(rendered.note))


def test_variables_reach_the_template() -> None:
    assert encoder(THINKS).render("1").text == "<u>1<a>"
    assert encoder(THINKS, variables={"enable_thinking": False}).render("1").text == "<u>1<a><t></t>"
    needs_tools = HEAD + "{{ tools|length }}"
    assert encoder(needs_tools, variables={"tools": []}).render("1").text == "<u>10"
    with pytest.raises(UserError, match=r"'tiny' fails \(TypeError: .* policy.template"):
        encoder(needs_tools).render("1")
    with pytest.raises(UserError, match="sets 'tokenize', which Forerun sets itself"):
        encoder(TEMPLATE, variables={"tokenize": True}).render("1")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (HEAD[:-15], "fails .TemplateSyntaxError"), ("<a>", "leaves out the user message"),
        ("{{ nothing.at.all }}", "fails .UndefinedError"), (HEAD.replace("'] }", "'] | upper }"), "leaves out"),
        (None, "no chat template"),
    ],
)  # fmt: skip
def test_a_template_that_loses_the_question_is_one_sentence(template: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        encoder(template).encode("how much is 1")
    assert "\n" not in str(raised.value)


def test_conversations_and_parts_of_callers() -> None:
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    assert encoder(TEMPLATE, system="be").render(turns).text == "<s>be<u>1<a>2<u>3<a>"
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": [{"type": "text", "text": "1"}]}]
    assert encoder(TEMPLATE, system="be").render(own).text == "<s>own<u>1<a>"
    with pytest.raises(UserError, match="content is not text"):
        encoder(TEMPLATE).render([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(UserError, match="has 3 messages"):
        encoder(TEMPLATE, chat=False).render(turns)
    with pytest.raises(UserError, match=r"\\ud83d, half of a surrogate pair"):
        encoder(TEMPLATE).encode("\ud83d")


def test_an_end_token_that_the_tokenizer_appends_is_not_part_of_a_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(ALPHABET)
    plain = tokenizer("1+1")["input_ids"]
    for single, head in (("$A </s>", []), ("</s> $A </s>", [0]), ("</s> $A", [0])):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("</s>", 0)])
        assert PromptEncoder(tokenizer, "tiny", chat=False).encode("1+1") == head + plain
        assert PromptEncoder(tokenizer, "tiny").ids("1+1", 0) == head + plain
        assert (
            PromptEncoder(tokenizer, "tiny").encode("1+1") == tokenizer("<u>1+1<a>", add_special_tokens=False).input_ids
        )


def test_a_folder_without_tokenizer_generates_from_ids_alone(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny("llama"), folder, ignore=lambda _, names: [n for n in names if n.startswith("tokenizer")])
    engine = forerun.load_engine("local", policy=str(folder), dtype="float32")
    assert len(engine.generate([[1, 2, 3]], max_new_tokens=4, seed=0)[0].tokens) <= 4
    for arguments in ((["text"],), ([[{"role": "user", "content": "1"}]],)):
        with pytest.raises(UserError, match="has no tokenizer, so it takes token ids alone"):
            engine.generate(*arguments)
    with pytest.raises(UserError, match="has no tokenizer"):
        engine.generate([[1, 2]], stop=["a"])
    with pytest.raises(UserError, match="neither token ids nor a text"):
        engine.generate([[1.5]])  # type: ignore[list-item]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(folder))


def test_generate_takes_ids_texts_and_messages(tiny: Callable[..., Path]) -> None:
    folder = str(tiny("llama"))
    policy, engine = load_policy(folder, "float32", "cpu"), forerun.load_engine("local", policy=folder, dtype="float32")
    prompts = [[3, 4], "1+1", [{"role": "user", "content": "1+1"}]]
    got = [r.prompt_ids for r in engine.generate(prompts, max_new_tokens=2)]
    assert got == [[3, 4], policy.tokenizer("1+1")["input_ids"], policy.encode("1+1")]
