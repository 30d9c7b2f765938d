"""Chat messages as users write them: `{"role": ..., "content": text or a list of text parts}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forerun.errors import UserError

Message = dict[str, str]
Messages = list[Message]  # contents are texts
Prompt = str | Messages


def as_messages(value: Any, where: str) -> Messages:
    """The same messages with text contents.

    Args:
        where: what the value is, as the subject of an error, e.g. "Row 3 of data.jsonl".

    Raises UserError when it is not a list of messages, or a content is not text (an image, say).
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise UserError(f"{where} has {type(value).__name__} where a non-empty list of messages is expected")
    return [_message(message, where) for message in value]


def check_text(text: str, where: str) -> None:
    """Raises UserError when a text holds half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where} holds {half}, half of a surrogate pair and no character; remove it") from None


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where} has a message without a 'role'; write each as {{role: user, content: text}}")
    return {"role": message["role"], "content": _text(message.get("content"), where)}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise UserError(f"{where} has a message whose content is not text, which this version does not support")
