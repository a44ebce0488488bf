from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta

from tests.unit.recorded_math import recorded
from vlm_reason.errors import UserError
from vlm_reason.evaluation.metrics import conformal, conformal_answers, conformal_quantile, coverage_band


def draw(seed: int, n: int, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(k), n)
    return p, np.array([generator.choice(k, p=row) for row in p])


def test_quantile_is_the_stated_order_statistic() -> None:
    scores = np.arange(1, 20) / 20  # n = 19
    assert conformal_quantile(scores, 0.1) == 18 / 20  # ceil(20 * 0.9) = 18, not 19 by rounding
    assert conformal_quantile(scores, 0.05) == 19 / 20
    assert conformal_quantile(scores, 0.04) == math.inf and conformal_quantile([], 0.5) == math.inf
    assert (
        conformal_quantile([0.2, math.inf], 0.5) == math.inf
        and conformal_quantile([0.2, math.inf], 0.7) == 0.2
    )
    for n in range(1, 60):
        for tenths in range(1, 10):
            index = -(-(n + 1) * (10 - tenths) // 10)  # the ceiling in whole numbers
            expected = math.inf if index > n else index
            assert conformal_quantile(np.arange(1, n + 1), tenths / 10) == expected
    with pytest.raises(UserError, match="score 1 is NaN"):
        conformal_quantile([0.1, math.nan], 0.1)
    for alpha in (0, 1, -0.1, math.nan):
        with pytest.raises(UserError, match="alpha must be between 0 and 1"):
            conformal_quantile([0.1], alpha)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_coverage_follows_its_beta_law(score) -> None:
    test_p, test_y = draw(0, 4000)
    coverage = []
    for seed in range(1, 81):
        p, y = draw(seed, 99)
        coverage.append(conformal(p, y, test_p, test_y, 0.1, score).coverage.value)
    law = beta(90, 10)  # n + 1 - l, l with n = 99, l = 10
    assert np.mean(coverage) == pytest.approx(law.mean(), abs=0.012)
    if score == "lac":
        assert np.std(coverage) == pytest.approx(law.std(), rel=0.25)
    low, high = coverage_band(99, 0.1)
    assert (low, high) == pytest.approx(law.interval(0.95))
    assert np.mean([low <= c <= high for c in coverage]) >= 0.85


def test_scores_by_hand() -> None:
    calibration = [[0.6, 0.3, 0.1]] * 4
    lac = conformal(calibration, [0, 0, 1, 2], [[0.5, 0.3, 0.2]], [1], alpha=0.4)
    assert lac.quantile == pytest.approx(0.7) and lac.sets == ((0, 1),) and lac.coverage.value == 1.0
    aps = conformal(calibration, [0, 0, 1, 2], [[0.5, 0.3, 0.2]], [1], alpha=0.4, score="aps")
    assert aps.quantile == pytest.approx(0.9) and aps.sets == ((0, 1),)
    tied = conformal([[0.5, 0.5]] * 4, [0, 1, 0, 1], [[0.25] * 4], [3], alpha=0.5, score="aps")
    assert tied.quantile == 1.0 and tied.sets == ((0, 1, 2, 3),)  # ties stand or fall together
    with pytest.raises(UserError, match="unknown score 'apt'; did you mean 'aps'"):
        conformal(calibration, [0] * 4, calibration, [0] * 4, score="apt")


def test_too_small_a_calibration_set_takes_everything_and_says_so() -> None:
    p, y = draw(0, 5)
    found = conformal(p, y, p, y, alpha=0.1)
    assert found.quantile == math.inf and found.coverage.value == 1.0 and found.size.value == 5.0
    assert "calibration too small" in found.coverage.flags and found.band == (1.0, 1.0)
    assert found.to_json()["quantile"] is None


def test_empty_sets_and_singletons_are_counted_and_classes_may_differ() -> None:
    sure = [[0.99, 0.01]] * 30
    found = conformal(sure, [0] * 30, [[0.99, 0.01], [0.4, 0.3, 0.3]], [0, 0], alpha=0.1)
    assert found.sets == ((0,), ()) and found.sizes.tolist() == [1, 0]
    assert (found.singletons.value, found.empty.value, found.size.value) == (0.5, 0.5, 0.5)
    assert found.coverage.value == 0.5


def test_sets_of_sampled_answers_by_hand() -> None:
    answers = [["a", "a", "b", None], ["a", "b", "c", "c"], ["a", "a", "a", "a"], ["b", "b", "b", "a"]]
    found = conformal_answers(answers, ["a"] * 4, answers, ["a", "b", "z", "b"], alpha=0.5)
    assert found.quantile == pytest.approx(0.75)  # scores of a: 1/2, 3/4, 0, 3/4; the 3rd of 4
    assert found.sets == (("a", "b"), ("c", "a", "b"), ("a",), ("b", "a"))  # most votes first
    assert found.coverage.value == 0.75 and found.size.value == 2.0


def test_coverage_beyond_what_was_sampled_is_said_to_be_out_of_reach() -> None:
    answers = [["a", "b"]] * 20
    found = conformal_answers(answers, ["a"] * 15 + ["z"] * 5, answers, ["a"] * 15 + ["z"] * 5, alpha=0.1)
    assert found.quantile == math.inf and "unreachable" in found.coverage.flags
    assert found.coverage.value == 0.75 and found.size.value == 2.0  # all that was sampled, and no more
    small = conformal_answers(answers[:3], ["a"] * 3, answers, ["a"] * 20, alpha=0.1)
    assert "calibration too small" in small.coverage.flags
    with pytest.raises(UserError, match="without a right answer"):
        conformal_answers(answers, [None] * 20, answers, ["a"] * 20)
    with pytest.raises(UserError, match="20 items in answers but 1 in gold"):
        conformal_answers(answers, ["a"], answers, ["a"] * 20)


def test_recorded_answers_are_covered(shared_data) -> None:
    data = recorded(shared_data)
    gold = [
        next((a for a, c in zip(x, y, strict=True) if c), "never sampled")
        for x, y in zip(data.answers, data.correct, strict=True)
    ]
    coverage, generator = [], np.random.default_rng(0)
    for _ in range(60):
        order = generator.permutation(100).tolist()
        first, second = order[:50], order[50:]
        take = lambda rows, which: [rows[i] for i in which]  # noqa: E731
        found = conformal_answers(
            take(data.answers, first), take(gold, first), take(data.answers, second), take(gold, second), 0.1
        )
        coverage.append(found.coverage.value)
    assert np.mean(coverage) >= 0.9 and np.mean(coverage) <= 0.96  # at most pass@8
