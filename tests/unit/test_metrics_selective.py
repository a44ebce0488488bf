"""Selective prediction and detection, against enumerated tie orders, loops and scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from vlm_reason.errors import UserError
from vlm_reason.evaluation.metrics import (
    augrc,
    aupr,
    aurc,
    auroc,
    coverage_at_risk,
    e_aurc,
    fpr_at_95,
    prr,
    risk_at_coverage,
    risk_coverage,
    roc_curve,
)

ITEMS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 1.0, 0.25])), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40)


def expected_curve(uncertainty: list, loss: list) -> np.ndarray:
    """[n]: L_i averaged over every order of the rows that respects the uncertainty."""
    orders = [
        order
        for order in itertools.permutations(range(len(loss)))
        if all(uncertainty[a] <= uncertainty[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([np.cumsum([loss[i] for i in order]) for order in orders], axis=0)


@settings(deadline=None, max_examples=60)
@given(ITEMS, st.floats(0.01, 1.0), st.floats(-0.1, 1.1))
def test_areas_are_means_over_the_orders_of_ties(items, coverage, risk) -> None:
    u, l = [u for u, _ in items], [x for _, x in items]
    n, sums, best = len(l), expected_curve(u, l), np.cumsum(sorted(l))
    rank = np.arange(1, n + 1)
    curve = risk_coverage(u, l)
    assert curve.risk == pytest.approx(sums / rank) and curve.oracle == pytest.approx(best / rank)
    assert aurc(u, l).value == pytest.approx(np.mean(sums / rank), abs=1e-12)
    assert e_aurc(u, l).value == pytest.approx(np.mean((sums - best) / rank), abs=1e-12)
    assert augrc(u, l).value == pytest.approx(np.mean(sums) / n, abs=1e-12)
    i = max(1, math.ceil(coverage * n - 1e-9))
    assert risk_at_coverage(u, l, coverage).value == pytest.approx(sums[i - 1] / i, abs=1e-12)
    fits = np.flatnonzero(sums / rank <= risk + 1e-10)
    assert coverage_at_risk(u, l, risk).value == pytest.approx((fits[-1] + 1) / n if len(fits) else 0.0)
    room = np.mean(l) - np.mean(best / rank)
    if room > 1e-9:
        assert prr(u, l).value == pytest.approx((np.mean(l) - np.mean(sums / rank)) / room, abs=1e-9)
    else:
        assert math.isnan(prr(u, l).value) and prr(u, l).flags == ("one class",)


def test_a_perfect_and_a_reversed_ranking() -> None:
    loss = np.array([0, 0, 0, 1, 1.0])
    assert prr(loss, loss).value == 1.0 and e_aurc(loss, loss).value == 0.0
    assert prr(-loss, loss).value < 0 and prr(np.zeros(5), loss).value == pytest.approx(0.0, abs=1e-12)
    assert coverage_at_risk(loss, loss, 0.0).value == 0.6 and coverage_at_risk(-loss, loss, 0.3).value == 0.0


@pytest.mark.parametrize("metric", [aurc, augrc, e_aurc, prr])
def test_the_error_is_the_spread_of_a_plain_bootstrap(metric) -> None:
    generator = np.random.default_rng(0)
    u = generator.integers(0, 12, 150) / 12
    l = (generator.random(150) < u).astype(float)
    estimate = metric(u, l)
    rows = [generator.integers(0, 150, 150) for _ in range(200)]
    plain = [_value(metric, u[r], l[r]) for r in rows]
    assert estimate.se == pytest.approx(np.std(plain, ddof=1), rel=0.2)
    assert estimate.ci == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=estimate.se)
    assert metric(u, l) == estimate and metric(u, l, seed=1).ci != estimate.ci


def _value(metric, u, l) -> float:
    """By the definition, ties in expectation."""
    _, code, count = np.unique(u, return_inverse=True, return_counts=True)
    rank = np.arange(1, len(u) + 1)
    sums, best = np.cumsum(np.repeat(np.bincount(code, weights=l) / count, count)), np.cumsum(np.sort(l))
    area, oracle = np.mean(sums / rank), np.mean(best / rank)
    values = {
        aurc: area,
        e_aurc: area - oracle,
        augrc: sums.mean() / len(u),
        prr: (l.mean() - area) / (l.mean() - oracle),
    }
    return values[metric]


def test_more_items_than_cells_change_the_error_little() -> None:
    generator = np.random.default_rng(1)
    u = generator.random(6000)
    l = (generator.random(6000) < u).astype(float)
    estimate = aurc(u, l)
    plain = [_value(aurc, u[r], l[r]) for r in (generator.integers(0, 6000, 6000) for _ in range(60))]
    assert estimate.value == pytest.approx(_value(aurc, u, l), abs=1e-12)
    assert estimate.se == pytest.approx(np.std(plain, ddof=1), rel=0.3)


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_detection_is_scikit_learns(pairs) -> None:
    s, y = np.array([s for s, _ in pairs], dtype=float), np.array([y for _, y in pairs], dtype=float)
    if y.min() == y.max():
        for estimate in (auroc(s, y), aupr(s, y), fpr_at_95(s, y)):
            assert math.isnan(estimate.value) and estimate.flags == ("one class",) and estimate.n == len(y)
        return
    assert auroc(s, y).value == pytest.approx(sklearn.roc_auc_score(y, s), abs=1e-12)
    assert aupr(s, y).value == pytest.approx(sklearn.average_precision_score(y, s), abs=1e-12)
    negatives = aupr(s, y, of_negatives=True).value
    assert negatives == pytest.approx(sklearn.average_precision_score(1 - y, -s), abs=1e-12)
    positive = np.sort(s[y == 1])[::-1]
    threshold = positive[math.ceil(0.95 * len(positive) - 1e-9) - 1]
    assert fpr_at_95(s, y).value == pytest.approx(np.mean(s[y == 0] >= threshold))
    curve = roc_curve(s, y)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(auroc(s, y).value)


def test_swapping_the_classes_changes_fpr95_and_mirrors_auroc() -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 300)
    s = generator.normal(size=300) * (1 + y) + y
    assert auroc(-s, 1 - y).value == pytest.approx(auroc(s, y).value)
    assert abs(fpr_at_95(-s, 1 - y).value - fpr_at_95(s, y).value) > 0.05


def test_any_finite_score_will_do() -> None:
    """A sequence log-probability is not squashed into [0, 1] first."""
    logps = np.array([-9000.0, -8000.0, -7000.0, -6000.0])
    assert auroc(logps, [0, 0, 1, 1]).value == 1.0 and aupr(logps, [0, 0, 1, 1]).value == 1.0


def test_delong_error_is_the_spread_over_new_data() -> None:
    generator = np.random.default_rng(2)
    values, errors, covered = [], [], 0
    for _ in range(300):
        y = np.repeat([0, 1], 60)
        estimate = auroc(generator.normal(size=120) + y, y)
        values.append(estimate.value)
        errors.append(estimate.se)
        covered += estimate.ci[0] <= 0.760250 <= estimate.ci[1]  # Phi(1 / sqrt 2)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15) and covered >= 0.91 * 300


def test_a_perfect_separation_keeps_its_width() -> None:
    estimate = auroc([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert estimate.value == 1.0 and estimate.flags == ("degenerate",) and estimate.ci[1] == 1.0
    assert 0.3 < estimate.ci[0] < 0.9
    assert auroc([0, 1, 2, 3, 4, 5], [1, 1, 1, 0, 0, 0]).ci == pytest.approx((0.0, 1 - estimate.ci[0]))
    wide, narrow = auroc([0, 0, 1, 1], [0, 0, 1, 1]), auroc([0] * 50 + [1] * 50, [0] * 50 + [1] * 50)
    assert wide.ci[0] < narrow.ci[0] and narrow.ci[0] > 0.9
    assert auroc([1, 1, 1, 1], [0, 1, 0, 1]).ci == (0.5, 0.5)
    assert auroc([0, 1, 2], [0, 0, 1]).flags == ("single",)


def test_nothing_and_bad_values() -> None:
    for metric in (aurc, e_aurc, augrc, prr, auroc, aupr, fpr_at_95):
        nothing = metric([], [])
        assert math.isnan(nothing.value) and nothing.flags == ("empty",) and nothing.n == 0
        for bad in (math.nan, math.inf, -math.inf):
            with pytest.raises(UserError, match=r"\[2\] is"):
                metric([0.0, 1.0, bad, 2.0], [0, 1, 1, 0])
            kept = metric([0.0, 1.0, bad, 2.0], [0, 1, 1, 0], on_invalid="drop")
            assert kept.value == metric([0.0, 1.0, 2.0], [0, 1, 0]).value and kept.n_dropped == 1
    assert len(risk_coverage([], []).risk) == 0 and math.isnan(risk_coverage([], []).base_risk)
    with pytest.raises(UserError, match="coverage must be in"):
        risk_at_coverage([0], [0], 0.0)
    with pytest.raises(UserError, match=r"positive\[0\] is 0.5, not 0 or 1"):
        auroc([0, 1], [0.5, 1])
    with pytest.raises(UserError, match="on_invalid must be"):
        aurc([0], [0], on_invalid="ignore")
    assert aurc([0.3], [1.0]).flags == ("single",)


def test_resamples_without_a_positive_say_nothing_about_the_false_positive_rate() -> None:
    """One positive among 50, in the middle: FPR 0.5 or so whenever it is drawn. 36 % of resamples lack it."""
    score = np.arange(50.0)
    estimate = fpr_at_95(score, score == 25)
    assert estimate.value == pytest.approx(24 / 49)
    assert estimate.ci[0] > 0.3 and estimate.se < 0.1
