"""Stop strings are found whatever their characters are made of: tokens of single bytes, as rare scripts have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forerun.engine.base import ends_with_stop

STOPS = ["สวัสดีครับ", "ආයුබෝවන්", "⟂" * 10, "🧬" * 8, "བཀྲ་ཤིས།", "終わり", "STOP", "\n\n"]


@pytest.fixture(scope="module")
def policy() -> Any:
    """With a byte-level tokenizer that has merged nothing: one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_string_is_found_with_its_last_byte(policy: Any, stop: str) -> None:
    tokens = policy.tokenizer(f"é🧬 some text before {stop}")["input_ids"]
    assert len(policy.tokenizer(stop)["input_ids"]) == len(stop.encode())
    ends = [ends_with_stop(policy, tokens[:length], (stop, "another one")) for length in range(1, len(tokens) + 1)]
    assert ends == [False] * (len(tokens) - 1) + [True]


def test_an_ordinary_stop_string_looks_back_no_further_than_it_is_long() -> None:
    """Its cost is the decoding of the window, with every token."""
    seen: list[int] = []

    def decode(tokens: list[int]) -> str:
        seen.append(len(tokens))
        return ""

    ends_with_stop(SimpleNamespace(tokenizer=SimpleNamespace(decode=decode)), [1] * 1000, ("###",))  # type: ignore[arg-type]
    assert seen == [3 + 8]
