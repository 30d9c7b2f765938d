"""Prompts as token ids: through the model's chat template, or as they are.

Templates of published models differ: some refuse a system message or drop it, some want contents as lists of parts.
A prompt is rendered in the first form of `FORMS` in which all that it says arrives; an error says why none did.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.chat import Messages, Prompt, as_messages, check_text
from forerun.errors import UserError
from forerun.models import smollm2

ALIASES = {"smollm2-135m": smollm2.folder}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.tiktoken", "spiece.model", "sentencepiece*.model", "merges.txt")
RESERVED = ("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict")
FOLDED = (
    "The chat template of '{name}' takes no system message; it is put at the head of the first user message instead"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model reads it, and what the user should know about it (said once per run)."""

    text: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns texts and messages into a model's token ids.

    Args:
        name: of the model, for errors.
        chat: false: a text is taken as it is, without template and system message.
        system: message before prompts that bring none of their own.
        variables: further variables of the template, e.g. enable_thinking.
    """

    tokenizer: Any
    name: str
    chat: bool = True
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids [P]. Raises UserError when the template does not take the prompt, see `render`."""
        text = self.render(prompt).text
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if self.chat else encode_text(self, text)

    def ids(self, prompt: Prompt | Sequence[int], index: int) -> list[int]:
        """Token ids [P] of what a caller of `generate` gives: ids and texts as they are, messages through the template.

        Raises UserError when it is none of these.
        """
        if isinstance(prompt, str):
            return encode_text(self, prompt)
        if all(isinstance(entry, Mapping) for entry in prompt) and prompt:
            return self.encode(as_messages(prompt, f"Prompt {index}"))
        try:
            return [operator.index(entry) for entry in prompt]  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"Prompt {index} is neither token ids nor a text nor a list of messages ({{role, content}})"
            ) from None

    def render(self, prompt: Prompt) -> Rendered:
        """The text that the model reads.

        Raises:
            UserError: there is no tokenizer or chat template; the template fails; or it leaves a message out in
                every form.
        """
        require_tokenizer(self.tokenizer, self.name)
        messages = self._messages(prompt)
        if not self.chat:
            return Rendered(self._plain(messages))
        if not self.tokenizer.chat_template and "chat_template" not in self.variables:
            raise UserError(
                f"The model '{self.name}' has no chat template; set policy.chat=false to give it questions as they "
                "are, or use an instruction-tuned model"
            )
        reasons: list[str] = []
        for form, note in FORMS:
            if (candidate := form(messages)) is None:
                continue
            try:
                text = self._apply(candidate)
            except Exception as error:  # a template is the model's own program
                reasons.append(f"fails ({type(error).__name__}: {_first_line(error)})")
                continue
            if lost := _lost(messages, text):
                reasons.append(f"leaves out the {lost} message")
                continue
            return Rendered(text, None if note is None else note.format(name=self.name))
        raise UserError(
            f"The chat template of '{self.name}' {reasons[0]}; give it the variables it needs with policy.template, "
            "e.g. policy.template.enable_thinking=false, or set policy.chat=false"
        )

    def _messages(self, prompt: Prompt) -> Messages:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else as_messages(prompt, "A prompt")
        for message in messages:
            check_text(message["content"], "A prompt")
        if self.chat and self.system is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *messages]
        return messages

    def _plain(self, messages: Messages) -> str:
        if len(messages) > 1:
            raise UserError(
                f"policy.chat=false gives the model texts as they are, and a prompt has {len(messages)} messages; "
                "set policy.chat=true, or give it as one text"
            )
        return messages[0]["content"]

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        if reserved := [name for name in RESERVED if name in self.variables]:
            raise UserError(f"'policy.template' sets '{reserved[0]}', which Forerun sets itself; leave it out")
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.variables
        )


def encode_text(encoder: PromptEncoder, text: str) -> list[int]:
    """Ids of a text as it is, with the start token that the tokenizer puts before it; an end token is not part of a
    prompt.
    """
    require_tokenizer(encoder.tokenizer, encoder.name)
    check_text(text, "A prompt")
    encoded = encoder.tokenizer(text, return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    end = len(ids)
    while end > 1 and added[end - 1]:
        end -= 1
    return ids[:end]


def require_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises UserError when a model came without one."""
    if tokenizer is None:
        raise UserError(
            f"The model '{name}' has no tokenizer, so it takes token ids alone; copy tokenizer.json and "
            "tokenizer_config.json into its folder to give it texts"
        )


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model by folder, hub name or alias; None where a folder has none.

    Raises UserError when it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = model_source(model)
    folder = Path(source)
    if folder.is_dir() and not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # files of any kind, read by a dozen libraries
        raise UserError(f"The model '{model}' has no usable tokenizer: {_first_line(error)}") from error


def model_context(model: str) -> int | None:
    """Positions that a model was made for, read from its configuration; None where that names none.

    Raises UserError when the configuration cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_source(model)).get_text_config()
    except Exception as error:  # configurations of models may be programs of their own
        raise UserError(f"The model '{model}' cannot be loaded: {_first_line(error)}") from error
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def model_source(model: str) -> str:
    """The folder of an alias; any other name as it is, with `~` for the home folder."""
    return str(ALIASES[model]()) if model in ALIASES else os.path.expanduser(model)


def _as_is(messages: Messages) -> list[dict[str, Any]] | None:
    return list(messages)


def _folded(messages: Messages) -> list[dict[str, Any]] | None:
    """The system message as the head of the first user message; None where there is none."""
    if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
        return None
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _in_parts(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if messages is None:
        return None
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


FORMS = (
    (_as_is, None),
    (_folded, FOLDED),
    (lambda messages: _in_parts(messages), None),
    (lambda messages: _in_parts(_folded(messages)), FOLDED),
)


def _lost(messages: Messages, text: str) -> str | None:
    """Role of the first message that is not in the text, white space aside; the model's own turns may be cut."""
    packed = "".join(text.split())
    for message in messages:
        if message["role"] not in ("assistant", "tool") and "".join(message["content"].split()) not in packed:
            return message["role"]
    return "user" if "'type':'text'" in packed else None  # a list of parts that was printed as Python shows it


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
