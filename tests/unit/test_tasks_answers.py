"""Extraction and canonical forms: the strings that decide whether two answers are the same vote."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_reason.errors import UserError
from vlm_reason.tasks.answers import AnswerKind, canonical, extract_answer, to_number


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("18", "18"), ("18.0", "18"), ("$18", "18"), ("18 dollars", "18"), ("1,000", "1000"),
        ("$1,234,567.50", "1234567.5"),
        ("\u22124", "-4"), ("-$4", "-4"), ("$-4", "-4"), ("- 4", "-4"), ("007", "7"), ("-0", "0"), (".5", "0.5"),
        ("2/4", "0.5"), ("1/3", "1/3"), ("-7/3", "-7/3"), ("\\frac{1}{8}", "0.125"), ("10{,}000", "10000"),
        ("1e3", "1000"), ("50%", "50"), ("0.050", "0.05"), ("84.", "84"), ("no number", None), ("2/0", None),
        ("1e999999", None), ("9" * 200, None), ("3 or 4", None), ("v2", None),
    ],
)  # fmt: skip
def test_number_canonical(written: str, value: str | None) -> None:
    assert canonical(written, "number") == value


@given(st.fractions(max_denominator=1000))
def test_number_canonical_keeps_the_value(value: Fraction) -> None:
    written = canonical(f"{value.numerator}/{value.denominator}", "number")
    assert written is not None
    assert to_number(written) == value
    assert canonical(written, "number") == written


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-1_000_000, max_value=1_000_000, places=4)
)
def test_number_formats_agree(value: Decimal) -> None:
    plain = canonical(f"{value:f}", "number")
    assert plain == canonical(f"{value:,f}", "number") == canonical(f"${value:f}00", "number")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("58 + 26 = 84", "84"), ("58-26", "26"), ("x = -26", "-26"), ("(3)-4", "4"),
        ("First 3. The answer is 5. I had 7 apples.", "5"), ("Answer: 58 + 26 = 84", "84"), ("so...\n#### 72\n", "72"),
        ("Answer:\n 84\n", "84"), ("**Answer:** 12", "12"), ("<answer> 9</answer> done 3", "9"),
        ("Answer: 1\nno wait\nAnswer: 2", "2"), ("\\boxed{5} and then \\boxed{\\frac{1}{2}} of 9", "1/2"),
        ("it is 3 or 4", None), ("nothing", None), ("", None), ("\\boxed{x} so 4", "4"),
    ],
)  # fmt: skip
def test_number_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text, "number") == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(b)", "B"), ("B.", "B"), ("B) blue", "B"), (" C\n", "C"), ("The answer is (C).", "C"), ("Answer: D", "D"),
        ("\\boxed{\\text{E}}", "E"), ("I pick option C here", "C"), ("(A) is wrong, so (B)", "B"), ("**B**", "B"),
        ("A stone", None), ("Because", None), ("I think so", None), ("", None),
    ],
)  # fmt: skip
def test_choice_extraction(text: str, letter: str | None) -> None:
    found = extract_answer(text, "choice")
    assert (None if found is None else canonical(found, "choice")) == letter


@pytest.mark.parametrize(
    ("text", "kind", "form"),
    [
        ("Yes.", "yes_no", "yes"), ("TRUE", "yes_no", "yes"), ("not false", "yes_no", "no"), ("maybe", "yes_no", None),
        (' "Hello   World". ', "text", "hello world"), ("\uff21", "text", "a"), ("...", "text", None),
        ("\\dfrac{1}{2}", "math", "0.5"), ("$x^2 + 1$", "math", "x^2+1"), ("\\left( 1 , 2 \\right)", "math", "(1,2)"),
    ],
)  # fmt: skip
def test_other_kinds(text: str, kind: AnswerKind, form: str | None) -> None:
    assert canonical(text, kind) == form


def test_boxed_braces_balance() -> None:
    assert extract_answer("so \\boxed{\\frac{a}{b^{2}}}.", "math") == "\\frac{a}{b^{2}}"
    assert extract_answer("so \\boxed{\\frac{a}{b", "math") == "so \\boxed{\\frac{a}{b"


@given(
    st.text(alphabet="0123456789.,+-/=()$\\\\{}frac boxedAB:#\n\u2212eE", max_size=60),
    st.sampled_from(get_args(AnswerKind)),
)
def test_any_text_is_read_and_canonical_is_stable(text: str, kind: AnswerKind) -> None:
    found = extract_answer(text, kind)
    form = None if found is None else canonical(found, kind)
    assert form is None or canonical(form, kind) == form


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="did you mean 'number'"):
        extract_answer("1", "numbr")  # type: ignore[arg-type]
