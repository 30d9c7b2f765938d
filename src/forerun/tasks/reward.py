"""Verifiable rewards: 1 for a right final answer, else 0."""

from __future__ import annotations

import logging
import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(completion: str) -> str:
    r"""What a completion gives as its answer: after the last `####`, else in the last `\boxed{}`, else the last number.

    An empty string when there is none of the three.
    """
    if "####" in completion:
        return completion.rsplit("####", 1)[1].strip().split("\n")[0].strip()
    if "\\boxed{" in completion:
        return _braced(completion.rsplit("\\boxed{", 1)[1])
    numbers = _NUMBER.findall(completion)
    return numbers[-1].replace(",", "") if numbers else ""


def math_reward(answer: str, completion: str) -> float:
    """1.0 where math-verify finds the final answer equal to the right one (1/2 = 0.5), else 0.0."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a timeout
    given = final_answer(completion)
    if not given:
        return 0.0
    # No timeouts: math-verify's use a signal, which only the main thread may set.
    gold, guess = (parse(f"${text}$", parsing_timeout=None) for text in (answer, given))
    return float(verify(gold, guess, timeout_seconds=None))


def _braced(text: str) -> str:
    """The text up to the brace that closes the one already open."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index].strip()
    return text.strip()
