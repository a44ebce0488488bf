"""The step checker and the leak diagnostic, on traces whose verdict is plain by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_reason.tasks.steps import answer_copied, check_steps
from vlm_reason.tasks.templates import ARITHMETIC


@pytest.mark.parametrize(
    ("trace", "n", "right"),
    [
        (" 58 + 26 = 84.", 1, 1), (" 58 + 26 = 84. 84 - 3 = 81.", 2, 2), (" 58 + 26 = 84 84 - 3 = 80", 2, 1),
        ("58 + 26 = 84.\n84 - 3 = 81.", 2, 2), ("48/2 = 24 clips", 1, 1), ("9 * 2 = $18 every day", 1, 1),
        ("0.2 x 50 = 10", 1, 1), ("3 \u00d7 4 = 12 = 24 \u00f7 2", 2, 2),
        ("3 - -1 = 4", 1, 1), ("7 \u2212 31 = \u221224", 1, 1),
        ("(2 + 3) * 4 = 20", 1, 1), ("2 + 3 * 4 = 20", 1, 0), ("10/3 = 3.33", 1, 1), ("10/3 = 3.34", 1, 0),
        ("7/2 = 4", 1, 0), ("3 * * 4 = 12", 1, 0), ("5/0 = 5", 1, 0), ("58 + = 84", 1, 0),
        ("1,000 + 1 = 1,001", 1, 1), ("12/60 = $0.2 per", 1, 1),
        ("x + 3 = 7", 0, 0), ("84 = 84", 0, 0), ("58 + 26 =", 0, 0), ("so it is 84", 0, 0), ("", 0, 0),
    ],
)  # fmt: skip
def test_check_steps(trace: str, n: int, right: int) -> None:
    check = check_steps(trace)
    assert (check.n_equations, check.n_right) == (n, right)
    assert check.all_right == (n > 0 and n == right)


def test_the_worked_examples_are_right_and_not_copied() -> None:
    for shot in ARITHMETIC.shots:
        assert check_steps(shot.trace).all_right
        assert not answer_copied(shot.trace, shot.answer)


@given(st.integers(-99, 99), st.integers(0, 99), st.integers(0, 99))
def test_sums_are_judged_exactly(a: int, b: int, claimed: int) -> None:
    assert check_steps(f" {a} + {b} = {claimed}.").all_right == (a + b == claimed)


@given(st.text(alphabet="0123456789.,+-*/=() x$%\n\u2212a", max_size=60), st.text(max_size=5))
def test_any_text_gets_a_verdict(trace: str, answer: str) -> None:
    check = check_steps(trace)
    assert 0 <= check.n_right <= check.n_equations <= trace.count("=")
    assert answer_copied(trace, answer) in (True, False)


def test_deep_nesting_is_a_wrong_equation() -> None:
    check = check_steps("(" * 20_000 + "1 + 1 = 2")
    assert (check.n_equations, check.n_right) == (1, 0)


@pytest.mark.parametrize(
    ("trace", "answer", "copied"),
    [
        (" 58 + 26 = 84.", "84", False), (" 58 + 27 = 84.", "84", True),
        (" 84 = 84.", "84", True), (" 84.", "84", True),
        (" 58 + 26", "84", False), (" 184 is near", "84", False), (" 7 - 31 = -24.", "-24", False),
        (" it is \u221224", "-24", True), (" 1,000", "1000", True),
        (" so it is B", "B", True), (" Because", "B", False),
        (" Paris is big", "paris", True), ("", "84", False), ("", "", False),
    ],
)  # fmt: skip
def test_answer_copied(trace: str, answer: str, copied: bool) -> None:
    assert answer_copied(trace, answer) is copied
