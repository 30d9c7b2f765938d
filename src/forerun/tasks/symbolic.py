"""Equality of two formulas by math-verify, behind a guard against what sympy would work on for ever.

The guard is cheap and refuses what no final answer needs: towers, huge exponents and factorials, sums and integrals
that still have to be evaluated, deep nesting. What passes it and takes long is ended by the reward worker's deadline.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from forerun.tasks.numbers import tidy

MAX_CHARACTERS = 1000
MAX_DEPTH = 20
MAX_OPERATORS = 100
LARGEST_EXPONENT = 10_000
_EVALUATES = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim|limsup|liminf|bigcup|bigcap)(?![A-Za-z])|\b(?:integral|sum|product)\b", re.I
)
_POWER = re.compile(r"(?:\^|\*\*)\s*\{?\s*\(?\s*-?\s*([\d,. ]+)")
_LARGE = re.compile(
    r"\d{4,}\s*[)}]*\s*!|!\s*[)}]*\s*!|binom[^a-z]*\d{5,}|\d{5,}\s*\\?choose|sqrt\s*\[[^\]]*\d{4,}|\d{301,}"
)
_GREEK = {"pi": r"\pi", "infinity": r"\infty", "theta": r"\theta"}
_SIGNS = str.maketrans(
    {"π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ",
     "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ", "θ": r"\theta "}
)  # fmt: skip


def equal(answer: str, given: str) -> bool:
    """Whether math-verify finds two formulas equal (1/2 = 0.5). False where the guard refuses the given one."""
    if not given or too_heavy(given):
        return False
    from math_verify import verify

    return bool(verify(parsed(answer), parsed(given), timeout_seconds=None))


@lru_cache(maxsize=4096)
def parsed(text: str) -> Any:
    """A formula as math-verify reads it; empty where it cannot."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of every call without a timeout
    # No timeouts: math-verify's use a signal, which only the main thread may set.
    return parse(f"${formula(text)}$", parsing_timeout=None)


def formula(text: str) -> str:
    """The text as LaTeX: names and signs of plain text are spelt out, words before a formula are left out."""
    text = tidy(text).translate(_SIGNS)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|infinity|theta)(?![A-Za-z])", lambda m: _GREEK[m[1].lower()], text, flags=re.I)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|ln|log|exp)(?=\s*\()", r"\\\1", text)
    return re.sub(r"^(?:(?!sqrt|frac|sin|cos|tan|log|exp|ln\b)[A-Za-z]{2,}[ :,]+)+(?=\S)", "", text)


def too_heavy(text: str) -> bool:
    """Whether sympy might not come to an end with this."""
    if len(text) > MAX_CHARACTERS or _EVALUATES.search(text) or _LARGE.search(text.replace(",", "")):
        return True
    if _depth(text) > MAX_DEPTH or sum(map(text.count, "+-*/^,")) > MAX_OPERATORS:
        return True
    return _tower(text) or any(_exponent(m[1]) > LARGEST_EXPONENT for m in _POWER.finditer(text))


def _exponent(digits: str) -> float:
    number = re.sub(r"[, ]", "", digits).strip(".")
    return float(number) if re.fullmatch(r"\d+(?:\.\d+)?", number) else 0.0


def _tower(text: str) -> bool:
    """A power in an exponent without a letter in it, more than two powers one in another, or a power of a power."""
    text = text.replace("**", "^").replace(" ", "")
    if re.search(r"\^\{?\(?-?[\d.{(]*\^", text) or re.search(r"\^\{?\d+\}?\)+\^\{?\d{3,}", text):
        return True
    return len(re.findall(r"\^[{(]?[^{}()]*(?=\^)", text)) > 2


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest
