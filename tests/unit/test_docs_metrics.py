"""docs/metrics.md against the code: every metric is a row, its arrow is the code's and is what good data show, the
signature has the arguments named, the example runs and its figures are right."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

import numpy as np
import pytest

from vlm_reason.evaluation import metrics
from vlm_reason.types import Estimate

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
ARROW = {"↑": 1, "↓": -1, "none": 0}
ROWS = {
    name: (arguments, ARROW[arrow])
    for name, arguments, arrow in re.findall(r"^\| `(\w+)\(([^)]*)\)` \| (\S+) \|", PAGE, re.MULTILINE)
}


def functions() -> dict[str, type]:
    """Public function -> what it returns."""
    found = {name: getattr(metrics, name) for name in metrics.__all__}
    return {name: typing.get_type_hints(f)["return"] for name, f in found.items() if inspect.isfunction(f)}


def test_every_metric_is_a_row_and_every_row_a_metric() -> None:
    estimates = {n for n, kind in functions().items() if inspect.isclass(kind) and issubclass(kind, Estimate)}
    assert set(ROWS) == estimates == set(metrics.DIRECTION)
    assert {name: arrow for name, (_, arrow) in ROWS.items()} == dict(metrics.DIRECTION)


def test_every_other_function_is_named() -> None:
    others = set(functions()) - set(ROWS) - {"pass_at_k_of_item", "pass_hat_k_of_item"}
    named = set(re.findall(r"`(\w+)[`(]", PAGE))
    assert others - named <= {"conformal_quantile", "coverage_band"}
    known = set(metrics.__all__) | set(dir(metrics))
    arguments = {a for f in functions() for a in inspect.signature(getattr(metrics, f)).parameters}
    words = (
        {w for w in named if "_" in w}
        - known
        - arguments
        - {"bin_n", "null_mean", "null_ci", "n_dropped", "plug_in"}
    )
    assert not words, f"the page names what the code has not: {words}"


@pytest.mark.parametrize("name", ROWS)
def test_the_arguments_are_those_of_the_function(name) -> None:
    parameters = list(inspect.signature(getattr(metrics, name)).parameters)
    arguments = [a.strip() for a in ROWS[name][0].split(",")]
    assert set(arguments) <= set(parameters) and arguments == [p for p in parameters if p in arguments]


def test_the_example_prints_what_it_says() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    scope: dict = {}
    exec(code[1].replace("print(", "("), scope)
    # three of four: [18 18 20] and [18 18 -] win, [18 20 -] twice is a tie; [7 5 5] never wins
    shown = float(re.search(r"maj_at_k.*# ([\d.]+)", code[1])[1])  # type: ignore[index]
    assert round(scope["metrics"].maj_at_k(scope["answers"], scope["gold"], k=3).value, 4) == shown
    assert shown == round((0.75 + 0 + 1) / 3, 4) and scope["votes"].share.tolist() == [0.5, 0.75, 1.0]


GENERATOR = np.random.default_rng(0)
RIGHT = (GENERATOR.random(400) < 0.7).astype(float)
SHARP = np.clip(0.7 * RIGHT + 0.3 * GENERATOR.random(400), 0, 1)  # knows what it knows
BLIND = GENERATOR.permutation(SHARP)
TWO = {"sharp": np.stack([1 - SHARP, SHARP], axis=1), "blind": np.stack([1 - BLIND, BLIND], axis=1)}
GOOD, BAD = [["a", "a", "a", "b"]] * 20, [["a", "b", "b", "b"]] * 20
FLAGS = {True: [[1, 1, 1, 0]] * 20, False: [[1, 0, 0, 0]] * 20}
BETTER_AND_WORSE = {
    "accuracy": lambda m: (m.accuracy([1, 1, 0]), m.accuracy([1, 0, 0])),
    "pass_at_k": lambda m: (m.pass_at_k([2], [4], 2), m.pass_at_k([1], [4], 2)),
    "pass_hat_k": lambda m: (m.pass_hat_k([3], [4], 2), m.pass_hat_k([2], [4], 2)),
    "maj_at_k": lambda m: (m.maj_at_k(GOOD, ["a"] * 20, 3), m.maj_at_k(BAD, ["a"] * 20, 3)),
    "maj_at_k_judged": lambda m: (
        m.maj_at_k_judged(GOOD, FLAGS[True], 3),
        m.maj_at_k_judged(BAD, FLAGS[False], 3),
    ),
    "best_of_k": lambda m: (m.best_of_k([[1, 2]], [[0, 1]], 2), m.best_of_k([[2, 1]], [[0, 1]], 2)),
    "nll": lambda m: (m.nll(SHARP, RIGHT), m.nll(BLIND, RIGHT)),
    "brier": lambda m: (m.brier(SHARP, RIGHT), m.brier(BLIND, RIGHT)),
    "brier_top": lambda m: (m.brier_top(SHARP, RIGHT), m.brier_top(BLIND, RIGHT)),
    "brier_multiclass": lambda m: (
        m.brier_multiclass(TWO["sharp"], RIGHT),
        m.brier_multiclass(TWO["blind"], RIGHT),
    ),
    "ece": lambda m: (m.ece(SHARP, RIGHT), m.ece(BLIND, RIGHT)),
    "mce": lambda m: (m.mce(SHARP, RIGHT, 2), m.mce(BLIND, RIGHT, 2)),
    "classwise_ece": lambda m: (m.classwise_ece(TWO["sharp"], RIGHT), m.classwise_ece(TWO["blind"], RIGHT)),
    "tace": lambda m: (m.tace(TWO["sharp"], RIGHT), m.tace(TWO["blind"], RIGHT)),
    "aurc": lambda m: (m.aurc(-SHARP, 1 - RIGHT), m.aurc(-BLIND, 1 - RIGHT)),
    "e_aurc": lambda m: (m.e_aurc(-SHARP, 1 - RIGHT), m.e_aurc(-BLIND, 1 - RIGHT)),
    "augrc": lambda m: (m.augrc(-SHARP, 1 - RIGHT), m.augrc(-BLIND, 1 - RIGHT)),
    "prr": lambda m: (m.prr(-SHARP, 1 - RIGHT), m.prr(-BLIND, 1 - RIGHT)),
    "risk_at_coverage": lambda m: tuple(m.risk_at_coverage(-c, 1 - RIGHT, 0.7) for c in (SHARP, BLIND)),
    "coverage_at_risk": lambda m: tuple(m.coverage_at_risk(-c, 1 - RIGHT, 0.1) for c in (SHARP, BLIND)),
    "auroc": lambda m: (m.auroc(SHARP, RIGHT), m.auroc(BLIND, RIGHT)),
    "aupr": lambda m: (m.aupr(SHARP, RIGHT), m.aupr(BLIND, RIGHT)),
    "fpr_at_95": lambda m: (m.fpr_at_95(SHARP, RIGHT), m.fpr_at_95(BLIND, RIGHT)),
}


@pytest.mark.parametrize("name", [name for name, arrow in metrics.DIRECTION.items() if arrow])
def test_the_arrow_points_from_worse_to_better(name) -> None:
    better, worse = BETTER_AND_WORSE[name](metrics)
    assert (better.value - worse.value) * metrics.DIRECTION[name] > 0


def test_the_figures_of_the_page() -> None:
    for n, golden in [(100, 0.105), (500, 0.048), (2000, 0.024)]:
        assert f"{golden}" in PAGE
        confidence = np.random.default_rng(n).beta(5, 2, n)
        assert metrics.null_band(confidence).mean == pytest.approx(golden, rel=0.08)
    from vlm_reason.evaluation.metrics import majority
    from vlm_reason.stats import RESAMPLES
    from vlm_reason.stats.resample import CELLS

    for number in (majority.EXACT_SAMPLES, majority.ENUMERATED, majority.SUBSETS, RESAMPLES, CELLS):
        assert f"{number:,}" in PAGE
