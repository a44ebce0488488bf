"""--require: what is read, what is refused, value against interval ends, and the exit status."""

from __future__ import annotations

import math

import pytest

from vlm_reason.errors import UserError
from vlm_reason.evaluation.requirements import Requirement
from vlm_reason.types import Estimate

ROWS = {
    "a": {
        "accuracy": Estimate(0.62, 0.02, (0.58, 0.66), 600),
        "pass@8": Estimate(0.9, 0.01, (0.88, 0.92), 75),
    },
    "b": {
        "accuracy": Estimate(0.55, 0.02, (0.51, 0.59), 600),
        "pass@8": Estimate(math.nan, math.nan, (math.nan, math.nan), 0),
    },
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("accuracy>=0.6", [True, False]),
        ("a:accuracy>=0.6", [True]),
        ("a:accuracy>=0.62", [True]),
        ("a:accuracy>0.62", [False]),
        ("a:accuracy.low>=0.6", [False]),
        (" a:accuracy.high <= 0.66 ", [True]),
        ("accuracy.value<1e0", [True, True]),
        ("b:accuracy<.55", [False]),
        ("pass@8>=0", [True, False]),
        ("b:pass@8<=1", [False]),
    ],
)
def test_bounds(text: str, kept: list[bool]) -> None:
    outcomes = Requirement.parse(text).judge(ROWS)
    assert [o.kept for o in outcomes] == kept


@pytest.mark.parametrize(
    "text",
    ["accuracy", "accuracy=0.6", "accuracy==0.6", "accuracy>=", "accuracy>=60%", ">=0.6", "accuracy>=0.6 and b>=1",
     "accuracy>=nan", "accuracy>=inf", "0.6<=accuracy", "accuracy>>0.6", ""],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="cannot read the requirement") as error:
        Requirement.parse(text)
    assert "\n" not in str(error.value) and "accuracy.low>=0.6" in str(error.value)


def test_names_that_do_not_exist_are_found_before_the_run() -> None:
    names = {task: list(rows) for task, rows in ROWS.items()}
    with pytest.raises(UserError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        Requirement.parse("acuracy>=0.6").check_names(names)
    with pytest.raises(UserError, match="no task 'c'; known: a, b"):
        Requirement.parse("c:accuracy>=0.6").check_names(names)
    with pytest.raises(UserError, match="'lo' is no part of an estimate; did you mean 'low'"):
        Requirement.parse("accuracy.lo>=0.6")
