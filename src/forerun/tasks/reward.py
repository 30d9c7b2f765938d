"""The default reward: 1 for a right final answer, else 0.

How it compares follows from the right answer: a plain number by its value, units and words around it aside; a formula
by math-verify; everything else (words, letters of a choice, dates, times) as text, in any case and without accents.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from forerun.tasks import symbolic
from forerun.tasks.base import NotScored, Problem
from forerun.tasks.extract import MARKER, boxed, final_answer, last_line, stated, unmarked
from forerun.tasks.numbers import FUNCTIONS, REFUSED, readings, tidy, words

__all__ = ["check_gold", "final_answer", "final_answer_reward", "gold", "judged", "math_reward"]

ROUNDED_PLACES = 6  # a decimal with so many places equals the fraction that rounds to it
_WORDS_ALONE = re.compile(  # dates, times, ranges, versions, codes, lists in an order
    r"\d+(?:[-/:]\d+){2,}.*|\d+\.\d+\.\d{1,2}(?:\.\d+)*|\d+ ?: ?\d+.*|\d+ ?- ?\d+|\d{1,2} ?[ap]\.? ?m\.?"
    r"|\d+(?:st|nd|rd|th)\b.+|\[[^,]*,[^,]*,.*\]|n/a",
    re.I | re.S,
)
_CODE = re.compile(r"(?!\d+[eE]\d+$)\w*[A-Za-z]\w*\d\w*")
_NAMES = FUNCTIONS | {"or", "and", "infinity", "theta"}  # in a formula
_CHOICE = re.compile(
    r"(?:option |choice |answer )?(?:\( ?([a-j]) ?\)|([a-j])(?:[).:]|$|(?= (?:is|because|since)\b)))(.*)", re.S
)
_SECOND_CHOICE = re.compile(r"\( ?[a-j] ?\)|\b[b-j][).:]|(?:\b(?:or|and)|,) ?\(?[a-j]\b(?! \w)")
_EXPLAINED = re.compile(r"[.;!?]\s|\s?\((?!or\b)|\s?—|,? ?(?:because|since)\b|\s-\s")
_ANSWERED = re.compile(r"(?:[,.:;!]| -) ?\w+(?: \w+){2}")  # "yes, the train arrives": a sentence, not a second answer
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


@dataclass(frozen=True, slots=True)
class Gold:
    """A right answer, and how it is compared."""

    text: str
    kind: Literal["number", "formula", "choice", "words"]
    values: frozenset[Fraction] = frozenset()  # of a number

    def pays(self, given: str) -> bool:
        """Whether an answer, as it is written, is right."""
        if not given.strip():
            return False
        if self.kind in ("number", "formula") and _squeezed(given) == _squeezed(self.text):
            return True
        match self.kind:
            case "number":
                return self._is_number(given)
            case "formula":
                return symbolic.equal(self.text, given)
            case "choice":
                return _chosen(self.text) == _chosen(given) or _said(self.text, given)
            case _:
                return _said(self.text, given)

    def _is_number(self, given: str) -> bool:
        if any(value.denominator > 1 for value in self.values):  # 3,5 may be a decimal
            given = re.sub(r"(?<![\d.,])(\d+),(?=\d{1,2}(?!\d))(?!\d+,)", r"\1.", given)
        values = readings(given)
        if values is not None:
            return any(_same(a, b) for a in self.values for b in values)
        text = tidy(given)
        if REFUSED & words(text) or _CODE.fullmatch(text) or re.search(r"\d\s+\d", text):
            return False
        return bool(re.search(r"[\d\\]", text)) and symbolic.equal(self.text, given)


def math_reward(answer: str, completion: str) -> float:
    """1.0 where the completion's final answer is the right one, else 0.0."""
    try:
        return judged(answer, completion)
    except NotScored:
        return 0.0


def judged(answer: str, completion: str) -> float:
    """As `math_reward`. Raises NotScored for a marked answer that it does not compute, such as 9^{9^{9}}."""
    if check_gold(answer) is not None:
        return 0.0
    right = gold(answer)
    marked = stated(completion)
    if any(right.pays(text) for text in (_unmarked(right, completion) if marked is None else marked)):
        return 1.0
    if right.kind in ("number", "formula") and any(symbolic.too_heavy(text) for text in marked or ()):
        raise NotScored("does not compute the answer: its value would take too long")
    return 0.0


def final_answer_reward(problem: Problem, completion: str) -> float:
    """The reward of tasks whose problems have an answer, see `judged`."""
    return judged(problem.answer, completion)


def check_gold(answer: object) -> str | None:
    """Why no completion could be right with this answer, as the end of a sentence ("is empty"); None when one can."""
    if answer is None:
        return "is null"
    if not isinstance(answer, str | int | float):
        return f"is a {type(answer).__name__}, not text or a number"
    return None if tidy(str(answer)) else "is empty"


@lru_cache(maxsize=65536)
def gold(answer: str) -> Gold:
    """How a right answer is compared; of a worked solution, the part after `####` or in the last box."""
    boxes, _ = boxed(answer)
    marked = answer.rsplit(MARKER, 1)[1] if MARKER in answer else answer
    text = tidy(boxes[-1] if boxes else marked) or tidy(answer)
    if _chosen(text) is not None:
        return Gold(text, "choice")
    if _WORDS_ALONE.fullmatch(text) or _CODE.fullmatch(text):
        return Gold(text, "words")
    values = readings(text)
    if values is not None and re.fullmatch(
        r"(?![A-Za-z]{3,})(?:[^A-Za-z]*[A-Za-z]*){,3}[^A-Za-z]*", text.replace("\\frac", "")
    ):
        return Gold(text, "number", values)
    return Gold(text, "formula" if _is_formula(text) else "words")


def _unmarked(right: Gold, completion: str) -> list[str]:
    """Where the answer may be in a completion that marks none."""
    if right.kind == "number":
        return unmarked(completion)
    return [*unmarked(completion), *last_line(completion)]


def _is_formula(text: str) -> bool:
    if not re.search(r"[\d\\=^+*/<>√π∞≤≥∪]|\w\(\w\)", text) or symbolic.too_heavy(text):
        return False
    plain = re.sub(r"\\(?:begin|end) ?\{\w+\}|\\[A-Za-z]+", " ", text)
    runs = [run for run in re.findall(r"[A-Za-z]+", plain) if run.lower() not in _NAMES]
    short = 3 if re.search(r"[=^+*\d]", text) else 1
    return all(len(run) <= short for run in runs) and not re.search(r"[^\W\d_A-Za-zπθ]{2}", text)


def _same(a: Fraction, b: Fraction) -> bool:
    return a == b or _rounds_to(a, b) or _rounds_to(b, a)


def _rounds_to(fraction: Fraction, decimal: Fraction) -> bool:
    """Whether a decimal of many places is what a fraction without an end rounds to, or is cut to."""
    if _places(fraction) is not None or (places := _places(decimal)) is None or places < ROUNDED_PLACES:
        return False
    scaled = fraction * 10**places
    return decimal * 10**places in (round(scaled), int(scaled))


def _places(number: Fraction) -> int | None:
    """Decimal places that write a number exactly; None where no number of them does."""
    twos, rest = 0, number.denominator
    fives = 0
    while rest % 2 == 0:
        twos, rest = twos + 1, rest // 2
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    return max(twos, fives) if rest == 1 else None


def _squeezed(text: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", tidy(text))


def _plain_words(text: str) -> str:
    """In lower case, without accents, articles and spaces beside punctuation."""
    text = unicodedata.normalize("NFKD", tidy(text)).casefold()
    text = "".join(character for character in text if not unicodedata.combining(character))
    text = re.sub(r"(\d) ?([ap])\.? ?m\b\.?", r"\1\2m", text)
    text = re.sub(r"\b0(\d:\d\d)", r"\1", text)
    text = re.sub(r"^(?:(?:it is|it's|therefore|so|thus|hence),? )?(?:the |an? )?(?=.)", "", text)
    return re.sub(r" ?([,:;/=()\[\]{}]) ?", r"\1", text)


def _said(right: str, given: str) -> bool:
    """Whether an answer in words is the right one, alone or with an explanation after it."""
    wanted, said = _plain_words(right), _plain_words(given)
    if wanted == said or (said.startswith("(") and said.endswith(")") and said[1:-1] == wanted):
        return True
    rest = said.removeprefix(wanted)
    if rest == said or not wanted:
        return False
    if (opposite := _OPPOSITE.get(wanted)) is not None:
        return (bool(_ANSWERED.match(rest)) and opposite not in re.findall(r"\w+", rest)) or bool(
            _EXPLAINED.match(rest)
        )
    return bool(_EXPLAINED.match(rest))


def _chosen(text: str) -> str | None:
    """The letter of a choice that stands first; None where there is none, or more than one."""
    match = _CHOICE.fullmatch(" ".join(tidy(text).split()).lower())
    if match is None or _SECOND_CHOICE.search(match[3]):
        return None
    return match[1] or match[2]
