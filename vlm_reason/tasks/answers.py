"""Reading answers: `extract_answer` finds the final answer in a text, `canonical` makes equal answers equal strings.

Two answers are the same vote exactly when their canonical forms are equal. Extraction prefers what the writer marked
as final (a box, `####`, `Answer:`, `the answer is`) and only then the last number or choice. It never invents: a text
without an answer, or one that hedges ("3 or 4"), gives None, and whoever asked counts that as wrong.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import Literal, get_args

from ..errors import UserError, nearest

AnswerKind = Literal["number", "choice", "yes_no", "math", "text"]

_MINUS = str.maketrans(
    {"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\uff0d": "-"}
)
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+"
# A minus directly behind a digit, a letter or a bracket subtracts; elsewhere it is a sign. The last number of
# "58-26" is 26, that of "= -26" is -26.
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<![\w)\]])-\s?)?(?:[$€£](?P<inner>-)?)?(?P<digits>{_UNSIGNED})"
    rf"(?:\s?/\s?(?P<under>\d+)(?![\d.]))?(?![\d]|[eE]\d)"
)
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_LONGEST_NUMBER = 100
_CUE = re.compile(
    r"(?:####|\b(?:final\s+)?answer\s*(?:\*\*)?\s*(?:is\b|:|=)|<answer>)(?P<tail>[^\n]*)", re.IGNORECASE
)
_LEADING_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*(?:$|[).:](?:\s|$)(?P<rest>.*))", re.DOTALL)
_CHOICE_IN_TEXT = re.compile(r"\(([A-Z])\)|\b(?:option|choice)\s+\(?([A-Z])\b")
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_TRUTH = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


def extract_answer(text: str, kind: AnswerKind) -> str | None:
    """The final answer in `text`, as written (not yet canonical), or None.

    Order: the last \\boxed{...}; behind the last `####`, `Answer:` or `the answer is`; then, for numbers, choices and
    yes/no, the last one in the text; for math and text, the text itself if it is one line.
    """
    _check(kind)
    for marked in (last_boxed(text), _behind_cue(text, one_sentence=kind in ("number", "yes_no"))):
        if marked is not None and (found := _read(marked, kind)) is not None:
            return found
    return _read(text, kind)


def canonical(answer: str, kind: AnswerKind) -> str | None:
    """The normal form of an extracted answer; None if it is no answer of this kind.

    number   "18.0" "$18" "18 dollars" -> "18"; "1,000" -> "1000"; U+2212 -> "-"; "2/4" -> "0.5"; "1/3" -> "1/3"
    choice   "(b)" "B." "B) blue" -> "B"
    yes_no   "Yes." "true" -> "yes"
    math     the number if it is one, else LaTeX without its decoration
    text     NFKC, lower case, single spaces, without quotes and a final period
    """
    _check(kind)
    if kind == "number":
        value = to_number(answer)
        form = "" if value is None else _write_number(value)
        return form if 0 < len(form) <= _LONGEST_NUMBER else None
    if kind == "choice":
        return _find_choice(answer)
    if kind == "yes_no":
        return _find_yes_no(answer)
    if kind == "math":
        text = _plain_latex(answer)
        value = to_number(text) if _whole_number(text) else None
        return (_write_number(value) if value is not None else text) or None
    return _plain_text(answer) or None


def to_number(text: str) -> Fraction | None:
    """The one number in `text`, exactly; the last one if there are several; None if there is none or it hedges."""
    found = _last_number(text)
    return None if found is None else _value(found)


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} (or \\fbox{...}) with balanced braces."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def _check(kind: str) -> None:
    if kind not in get_args(AnswerKind):
        raise UserError(f"unknown answer kind {kind!r}{nearest(kind, get_args(AnswerKind))}")


def _behind_cue(text: str, one_sentence: bool) -> str | None:
    cues = list(_CUE.finditer(text))
    if not cues:
        return None
    tail = cues[-1]["tail"].partition("</answer>")[0].strip().strip("*").strip()
    if not tail:  # "Answer:" alone on its line: the answer stands on the next
        tail = text[cues[-1].end() :].strip().partition("\n")[0].strip()
    return (tail.partition(". ")[0] if one_sentence else tail) or None


def _read(text: str, kind: AnswerKind) -> str | None:
    if kind == "number":
        found = _last_number(text)
        return None if found is None else found[0].strip()
    if kind == "choice":
        return _find_choice(text)
    if kind == "yes_no":
        return _find_yes_no(text)
    line = text.strip()
    return line if line and "\n" not in line else None


# ---- numbers ----


def _last_number(text: str) -> re.Match[str] | None:
    text = text.translate(_MINUS).replace("{,}", ",").replace("\\$", "$")
    text = _FRACTION.sub(r"\1/\2", re.sub(r"\\[,!]", "", text))
    numbers = [m for m in _NUMBER.finditer(text) if len(m[0]) <= _LONGEST_NUMBER]
    if not numbers:
        return None
    if len(numbers) > 1 and re.fullmatch(r"[\s$]*or[\s$]*", text[numbers[-2].end() : numbers[-1].start()]):
        return None
    return numbers[-1]


def _value(match: re.Match[str]) -> Fraction | None:
    value = Fraction(Decimal(match["digits"].replace(",", "")))
    if match["under"] is not None:
        if int(match["under"]) == 0:
            return None
        value /= int(match["under"])
    return -value if match["sign"] or match["inner"] else value


def _whole_number(text: str) -> bool:
    found = _NUMBER.fullmatch(text.translate(_MINUS))
    return found is not None and len(text) <= _LONGEST_NUMBER


def _write_number(value: Fraction) -> str:
    """An integer, a terminating decimal without trailing zeros, or a reduced fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


# ---- choices, yes and no, text ----


def _find_choice(text: str) -> str | None:
    stripped = _unwrap(text)
    leading = _LEADING_CHOICE.fullmatch(stripped)
    if leading and not _CHOICE_IN_TEXT.search(leading["rest"] or ""):  # "(A) is wrong, so (B)" is not A
        return leading[1].upper()
    named = [a or b for a, b in _CHOICE_IN_TEXT.findall(stripped)]
    return named[-1] if named else None


def _find_yes_no(text: str) -> str | None:
    words = _YES_NO.findall(text)
    return _TRUTH[words[-1].lower()] if words else None


def _unwrap(text: str) -> str:
    text = text.strip().strip("*$ ").strip()
    inner = re.fullmatch(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", text)
    return inner[1].strip() if inner else text


def _plain_text(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(_MINUS)
    return re.sub(r"\s+", " ", text).lstrip("\"'`* ").rstrip("\"'`*. ").casefold()


def _plain_latex(text: str) -> str:
    """LaTeX with its decoration removed: enough for votes; equality of formulas is math-verify's work."""
    text = _unwrap(text.translate(_MINUS))
    text = _FRACTION.sub(r"\1/\2", re.sub(r"\\[dt]frac", r"\\frac", text).replace("{,}", ","))
    text = re.sub(r"\\left|\\right|\\[,!;: ]|\\mathrm|\\text|\^\{?\\circ\}?|\\%|%|\\\$|\$", "", text)
    return re.sub(r"\s+", "", text).rstrip(".")
