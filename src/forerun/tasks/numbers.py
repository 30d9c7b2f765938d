"""Plain numbers as people write them: currencies, thousands, fractions, percentages, units, words around them.

A number may be read in two ways (18% is 18 and 0.18; 2 million is 2 and 2,000,000), so reading one gives a set. What is
no single plain number (an expression, a list, a range) is None and left to algebra.
"""

from __future__ import annotations

import re
from fractions import Fraction

from forerun.tasks.extract import normal

MAX_DIGITS = 1000
MAX_EXPONENT = 400
FACTORS = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "万": 10**4, "亿": 10**8,
}  # fmt: skip
REFUSED = {
    "not",
    "or",
    "and",
    "between",
    "from",
    "than",
    "half",
    "twice",
    "root",
    "cannot",
    "never",
}  # say something of a number
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "log", "ln", "exp", "sqrt", "pi", "mod", "max", "min", "gcd", "lcm"}

_CURRENCY = r"(?:US\$|USD|EUR|GBP|Rs\.?|[$€£¥₹₩])"
_NUM = (
    r"(?:\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}"  # 1.234,5 and 1.234.567
    r"|\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)(?:\.\d+)?"  # 1,234.5 and 1,00,000
    r"|\d{1,3}(?:['’ ]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"  # 1 234.5, 1'234, 1234.5, .5
)
_WRITTEN = re.compile(
    rf"(?P<head>[^\d+*/^\\|<>≤≥≠=(\[{{]*?)(?<![A-Za-z.])(?P<sign>[-+]|(?:minus|negative)\s)?\s*{_CURRENCY}?\s*(?P<inner>[-+])?"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s?/))?(?P<top>{_NUM})(?:\s?/\s?{_CURRENCY}?(?P<bottom>{_NUM})|[eE](?P<power>[-+]?\d+))?"
    r"(?P<after>.*)",
    re.S | re.I,
)
_FRACTION = re.compile(r"\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_POWER_OF_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[x*·×])\s*10\s*\^\s*\{?\s*(-?\d+)\s*\}?")
_SIDES = re.compile(r"(?<![<>!=≤≥≠:])=(?![=<>])|≈|\\approx\b")
_CHOICE = re.compile(r"\(?[A-J][).:]\s+(?=\S)")
_NO_UNIT = re.compile(
    r"[xyznkabcpqrtuvwije](?![A-Za-z.'])|\s+[xyznkabcpqrtuvwije]\s*(?:$|[-+*/^=])|[\^!(\[{]|\s*[-+*/^=<>!×÷·:]\s*[\d.({\\]"
    r"|\s*(?:(?:pi|sqrt|sin|cos|tan|log|ln|exp|mod|choose|theta|infinity|or|and|to|plus|minus|times)\b|[π√∞])",
    re.I,
)
_SEPARATOR = re.compile(
    r"[.;!?](?:\s|$)|[,:]\s*(?!\s*[-$]?\d)|\s-+\s(?![\d.])|\s\(|[—。，]"
    r"|\s(?:because|since|as|so|which|that|per|in|for|out of|of|every|each|after|from|on|with|by|at|is|are|if|when)\b",
    re.I,
)
_UNIT = re.compile(r"(?:[^\d^+*=<>≤≥≠|\\!:,]|\^\{?-?\d\}?|(?<=[A-Za-z])\d\b|\^\s*\{?\\circ\}?)*")
_SPACES = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad\b|~|\\(?:left|right)\b")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit|operatorname|textrm|mathit)\s*\{([^{}]*)\}")
_TAGS = re.compile(r"(?<![\w)])\*\*(?=\S)|(?<=\S)\*\*(?![\w(])|</?(?:b|strong|i|em|u|p|br|code|answer) ?/?>|`")
_DOLLARS = re.compile(r"\$(?!\d[\d.,]*\s*$)(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.S)


def readings(text: str) -> frozenset[Fraction] | None:
    """What the text may mean if it is one plain number, with a unit or words around it, else None."""
    text = tidy(text)
    if len(text) > 2 * MAX_DIGITS:
        return None
    text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text)
    text = _POWER_OF_TEN.sub(r"e\1", _CHOICE.sub("", _SIDES.split(text)[-1].strip(), count=1))
    written = _WRITTEN.fullmatch(text.replace("- ", "-", 1) if text.startswith("- ") else text)
    if written is None or (REFUSED | FUNCTIONS) & words(written["head"]):
        return None
    value = _value(written)
    return None if value is None else _with_unit(value, written["after"].rstrip())


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"[a-z]+", text.lower().replace("n't", " not")))


def tidy(text: str) -> str:
    """Without Markdown, LaTeX text and spacing, quotes, and punctuation at the ends."""
    text = normal(text).replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"(\d)\\[,;: ](?=\d{3}(?!\d))", r"\1", _WORDS.sub(r" \1 ", text))
    text = _SPACES.sub(" ", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _unquoted(" ".join(_TAGS.sub("", text).split()))
    inner = _DOLLARS.fullmatch(text)
    return text if inner is None else _unquoted(next(group for group in inner.groups() if group is not None))


def _unquoted(text: str) -> str:
    while True:
        shorter = text.strip().rstrip(".,;:。，！").strip()
        if len(shorter) > 1 and shorter[0] in "\"'“‘*_" and shorter[-1] in "\"'”’*_":
            shorter = shorter[1:-1]
        if shorter == text:
            return text
        text = shorter


def _value(written: re.Match[str]) -> Fraction | None:
    """The number itself; None where it is too large to be one, or a division by zero."""
    whole, bottom, power = (written[name] for name in ("whole", "bottom", "power"))
    if sum(map(str.isdigit, written[0])) > MAX_DIGITS or (power and (len(power) > 6 or abs(int(power)) > MAX_EXPONENT)):
        return None
    size = _decimal(written["top"])
    if bottom is not None:
        divisor = _decimal(bottom)
        if not divisor:
            return None
        size = int(whole or 0) + size / divisor
    size *= Fraction(10) ** int(power or 0)
    sign = (written["sign"] or "").strip().lower()
    return -size if (sign not in ("", "+")) != (written["inner"] == "-") else size


def _decimal(text: str) -> Fraction:
    text = re.sub(r"['’ ]", "", text)
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", text) or text.count(".") > 1:
        text = text.replace(".", "").replace(",", ".")
    text = text.replace(",", "")
    return Fraction(f"0{text}0" if "." in text else text)


def _with_unit(value: Fraction, after: str) -> frozenset[Fraction] | None:
    """The readings of a number with what follows it."""
    if re.match(r"\s*(?:%|percent\b)", after, re.I):
        return frozenset({value, value / 100})
    word = re.match(r"\s*([A-Za-z]+|[万亿])", after)
    if word is not None and (factor := FACTORS.get(word[1].lower())) is not None:
        return frozenset({value, value * factor})
    if _NO_UNIT.match(after):
        return None
    unit = _SEPARATOR.split(after, maxsplit=1)[0]
    return frozenset({value}) if _UNIT.fullmatch(unit) else None
