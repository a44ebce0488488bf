"""Are the steps of an arithmetic trace right, and is its answer derived or only copied?

Diagnostics for traces drawn behind a hint: a posterior that was told the answer can write it down without deriving it.
They read equations such as `58 + 26 = 84` or `48/2 = 24 = 20 + 4` in running text. They do not read algebra, words or
units inside an expression, and they do not ask whether a step belongs to the problem.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from .answers import to_number

_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)|(?P<op>[-+*/×÷·]|(?<=[\d )])x(?=[\d (]))"
    r"|(?P<bracket>[()])|(?P<equals>=)|(?P<space>[ \t$%]+)|(?P<other>.)",
    re.DOTALL,
)
_OPERATORS = {"×": "*", "·": "*", "x": "*", "÷": "/"}
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})


@dataclass(frozen=True)
class StepCheck:
    """n_equations a trace states, how many hold, and whether there is one and all hold."""

    n_equations: int
    n_right: int

    @property
    def all_right(self) -> bool:
        return self.n_equations > 0 and self.n_right == self.n_equations


@dataclass(frozen=True)
class Equation:
    """left = right, both as lists of tokens; `value` is the right side's value, None where it cannot be computed."""

    right: bool
    value: Fraction | None


def check_steps(text: str) -> StepCheck:
    """Count the equations in `text` and those that hold.

    A chain a = b = c is two equations. An equation counts if one of its sides computes something; a side that is not
    an expression ("58 + = 84") counts as wrong. A right side written with decimals may be rounded to its digits.
    """
    equations = find_equations(text)
    return StepCheck(len(equations), sum(e.right for e in equations))


def answer_copied(trace_text: str, answer: str) -> bool:
    """True if the trace holds the answer and no right equation yields it.

    For a numeric answer, `58 + 26 = 84` derives 84; `84`, `58 + 27 = 84` and `84 = 84` copy it. For any other answer
    its occurrence as whole words counts as copied, since derivation cannot be told. A number the problem itself gives
    can be the answer by chance (`5 + 0 = ?`); compare rates, not single traces.
    """
    value = to_number(answer)
    if value is None or not re.fullmatch(r"[\s$]*[-\u2212]?[\d.,/ ]+%?[\s.]*", answer):
        words = re.escape(answer.strip())
        return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", trace_text, re.IGNORECASE) is not None
    if any(e.right and e.value == value for e in find_equations(trace_text)):
        return False
    written = re.findall(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", trace_text.translate(_MINUS))
    if value >= 0:  # "5-3" holds 3 as well as -3
        written += [w.lstrip("-") for w in written]
    return any(Fraction(Decimal(w.replace(",", ""))) == value for w in written)


def find_equations(text: str) -> list[Equation]:
    """All equations of `text`, in order."""
    equations = []
    for run in _runs(text.translate(_MINUS)):
        sides = _split(run)
        for left, right in zip(sides, sides[1:], strict=False):
            if any(t in "+-*/" for t in (*left[1:], *right[1:])):
                equations.append(_equation(left, right))
    return equations


def _equation(left: list[str], right: list[str]) -> Equation:
    a, b = _evaluate(left), _evaluate(right)
    if a is None or b is None:
        return Equation(False, b)
    return Equation(a == b or _rounds_to(a, b, right), b)


def _rounds_to(value: Fraction, written: Fraction, side: list[str]) -> bool:
    """`10 / 3 = 3.33` holds at the two decimals it is written with; `7 / 2 = 4` does not."""
    if len(side) > 2 or "." not in side[-1]:
        return False
    places = len(side[-1].partition(".")[2])
    return abs(value - written) <= Fraction(1, 2 * 10**places)


def _runs(text: str) -> list[list[str]]:
    """Maximal stretches of arithmetic that hold an `=`. A word, a sentence end or a number behind a number ends one."""
    runs: list[list[str]] = [[]]
    for match in _TOKEN.finditer(text):
        if match["space"]:
            continue
        token = _OPERATORS.get(match[0], match[0])
        run = runs[-1]
        if match["other"]:
            runs.append([])
        elif match["number"] and run and _is_number(run[-1]):
            runs.append([token])
        else:
            run.append(token)
    # What starts with an operator or "=" goes on from a word ("x + 3 = 7"): it is not ours to judge.
    return [run for run in runs if "=" in run and (_is_number(run[0]) or run[0] in "(-")]


def _split(run: list[str]) -> list[list[str]]:
    sides: list[list[str]] = [[]]
    for token in run:
        if token == "=":
            sides.append([])
        else:
            sides[-1].append(token)
    return sides if sides[-1] else sides[:-1]


def _is_number(token: str) -> bool:
    return token[-1].isdigit()


def _evaluate(tokens: list[str]) -> Fraction | None:
    """Value of an expression by precedence climbing, or None if it is none (or divides by zero)."""
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        return None
    return None if rest else value


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    return _chain(tokens, _product, "+-")


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    return _chain(tokens, _atom, "*/")


def _chain(
    tokens: list[str], operand: Callable[[list[str]], tuple[Fraction, list[str]]], operators: str
) -> tuple[Fraction, list[str]]:
    value, tokens = operand(tokens)
    while tokens and tokens[0] in operators:
        operator, (right, tokens) = tokens[0], operand(tokens[1:])
        value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__, "/": value.__truediv__}[
            operator
        ](right)
    return value, tokens


def _atom(tokens: list[str]) -> tuple[Fraction, list[str]]:
    head, rest = tokens[0], tokens[1:]
    if head in "+-":
        value, rest = _atom(rest)
        return (-value if head == "-" else value), rest
    if head == "(":
        value, rest = _sum(rest)
        if rest[0] != ")":
            raise ValueError("unbalanced bracket")
        return value, rest[1:]
    if not _is_number(head):
        raise ValueError(f"expected a number, got {head!r}")
    return Fraction(Decimal(head.replace(",", ""))), rest
