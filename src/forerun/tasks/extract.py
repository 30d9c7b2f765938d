r"""Where a completion gives its answer.

What is stated counts, in this order: the last `\boxed{}`, the last `<answer>` tag, what follows the last `####`. Else
what follows "the answer is", or the last number or formula. A box that was cut off, and reasoning that was never closed
(`<think>`), state nothing. Everything is text here: `reward.py` compares.
"""

from __future__ import annotations

import re
import unicodedata

MARKER = "####"
_BOX = re.compile(r"\\(?:boxed|fbox) *\{")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z]) *(-?[\d.,]*\d|\\?[A-Za-z]+)")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.S | re.I)
_HEADING = re.compile(
    r"(?:the |my |our )?(?:(?:final|correct|numerical) )?(?:answer|solution|result|conclusion|summary|response)(?: is)?"
    r"|therefore|答案",
    re.I,
)
_STEP = re.compile(r"(?:step|part|case|stage) \w+\b", re.I)
_PHRASE = re.compile(
    r"\b(?:answer|final result|(?:correct|right|best) (?:option|choice)|antwort|réponse|respuesta)\b"
    r"(?: to [^.\n]{1,60}?)?"
    r"[*_\s]*(?:\b(?:is|are|equals)\b|[:=])[:*_\s]*"
    r"|答案(?:是|为|：|:)+\s*",
    re.I,
)
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]"
    r"|(-?\d*\\[dt]?frac ?\{[^{}]*\}\{[^{}]*\})",
    re.S,
)
_PART = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-+])?(?:\d+ (?=\d+/\d))?{_PART}(?:(?:[-:]| ?/ ?){_PART})*%?")
_MARKS = str.maketrans({"−": "-", "–": "-", "﹣": "-", "⁄": "/"})
_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_VULGAR = re.compile("(\\d) ?([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")


def final_answer(completion: str) -> str:
    """The answer as it is written, a number without commas; an empty string when there is none."""
    given = stated(completion)
    found = next(iter(unmarked(completion) if given is None else given), "")
    return found.replace(",", "") if _NUMBER.fullmatch(found) else found


def stated(completion: str) -> list[str] | None:
    """What is marked as the answer, the likeliest reading first; empty: it was cut off; None: nothing is marked."""
    text = spoken(completion)
    if text is None:
        return []
    boxes, cut = boxed(text)
    if boxes:
        return [boxes[-1], ", ".join(boxes)][: len(boxes)]
    if cut:
        return []
    if tags := _TAG.findall(text):
        return stated(tags[-1]) or [tags[-1].strip()]
    if MARKER in text:
        return _marked(text.rsplit(MARKER, 1)[1])
    return None


def unmarked(completion: str) -> list[str]:
    """Where an answer is when none is marked: after "the answer is", else the last number or formula."""
    text = normal(spoken(completion) or "")
    phrase = after_phrase(text)
    if phrase is not None and re.search(r"[\d\\]", phrase):
        return [phrase]
    said = [] if phrase is None else [phrase]  # in words, or "as follows"
    formula, number = _last(_FORMULA, text), _last(_NUMBER, text)
    if formula is not None and (number is None or number.end() <= formula.end()):
        return [*said, next(group for group in formula.groups() if group is not None).strip()]
    return [*said, *([number.group()] if number is not None else [])]


def last_line(completion: str) -> list[str]:
    """The last line that is not blank; the completion itself where it is one line."""
    return [line.strip() for line in (spoken(completion) or "").splitlines() if line.strip()][-1:]


def spoken(completion: str) -> str | None:
    """What follows the reasoning between think tags; None where it was never closed."""
    reasoning, end, rest = completion.rpartition("</think>")
    if end:
        return rest if rest.strip() else reasoning
    return None if "<think>" in completion else completion


def boxed(text: str) -> tuple[list[str], bool]:
    """The contents of the boxes, and whether one was cut off."""
    starts = {match.end() for match in _BOX.finditer(text)}
    found = {match.start(1): match[1] for match in _BARE_BOX.finditer(text)}
    opened: list[int] = []
    for match in _BRACE.finditer(text) if starts else ():
        if match[0] == "{":
            opened.append(match.end())
        elif match[0] == "}" and opened and (start := opened.pop()) in starts:
            found[start] = text[start : match.start()].strip()
    return [found[start] for start in sorted(found)], any(start in starts for start in opened)


def after_phrase(text: str) -> str | None:
    """The rest of the sentence after the last "the answer is"."""
    last = _last(_PHRASE, text)
    if last is None:
        return None
    return re.split(r"\n|[.!?](?:\s|$)|。", text[last.end() :].lstrip(), maxsplit=1)[0].strip() or None


def normal(text: str) -> str:
    """One spelling of digits, minus signs, spaces, fractions and superscripts."""
    text = _VULGAR.sub(r"\1 \2", text)
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    return unicodedata.normalize("NFKC", text).translate(_MARKS)


def _marked(tail: str) -> list[str]:
    """The first line that says something: a heading such as "#### Final Answer" does not."""
    rest = [line.strip() for line in tail.splitlines() if line.strip()]
    while rest and _HEADING.fullmatch(rest[0].strip("*_:# \t")):
        rest.pop(0)
    if not rest:
        return []
    if _STEP.match(rest[0].strip("*_# ")) and len(rest) > 1:
        return unmarked("\n".join(rest[1:]))
    phrase = after_phrase(normal(rest[0]))
    return [rest[0]] if phrase is None else [phrase, rest[0]]


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for match in pattern.finditer(text):
        found = match
    return found
