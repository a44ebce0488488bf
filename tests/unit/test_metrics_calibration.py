from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from vlm_reason.errors import UserError
from vlm_reason.evaluation.metrics import (
    brier,
    brier_multiclass,
    brier_top,
    classwise_ece,
    ece,
    mce,
    nll,
    null_band,
    reliability_diagram,
    tace,
)
from vlm_reason.evaluation.metrics.binning import make_bins, mass_groups
from vlm_reason.stats import wilson

PAIRS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.875, 1.0]) | st.floats(0, 1), st.booleans()),
    min_size=1,
    max_size=40,
)


def brute_bins(confidence: list[float], bins: int) -> list[list[int]]:
    """Right-closed bins of equal width, by testing every item against every bin."""
    found = [
        [i for i, c in enumerate(confidence) if (b / bins < c or (b == 0 and c == 0)) and c <= (b + 1) / bins]
        for b in range(bins)
    ]
    assert sorted(sum(found, [])) == list(range(len(confidence)))
    return found


@settings(deadline=None, max_examples=60)
@given(PAIRS, st.integers(1, 20))
def test_ece_and_mce_are_the_sums_over_bins(pairs, bins) -> None:
    confidence, correct = [c for c, _ in pairs], [float(y) for _, y in pairs]
    l1, gaps, squared = 0.0, [], 0.0
    for members in filter(None, brute_bins(confidence, bins)):
        acc, conf = np.mean([correct[i] for i in members]), np.mean([confidence[i] for i in members])
        l1 += len(members) / len(pairs) * abs(acc - conf)
        gaps.append((abs(acc - conf), len(members)))
        correction = acc * (1 - acc) / (len(members) - 1) if len(members) > 1 else 0.0
        squared += len(members) / len(pairs) * ((acc - conf) ** 2 - correction)
    assert ece(confidence, correct, bins).value == pytest.approx(l1, abs=1e-12)
    worst = mce(confidence, correct, bins)
    assert worst.value == pytest.approx(max(g for g, _ in gaps), abs=1e-12)
    assert worst.bin_n == max(n for g, n in gaps if g >= worst.value - 1e-9) or len(gaps) > 1
    debiased = ece(confidence, correct, bins, debiased=True)
    assert debiased.value == pytest.approx(math.sqrt(max(0.0, squared)), abs=1e-6)
    if abs(squared) > 1e-9:
        assert ("clipped" in debiased.flags) == (squared < 0)


def test_debiased_error_is_unbiased_where_the_plug_in_is_not() -> None:
    generator = np.random.default_rng(0)
    plug_in, corrected = [], []
    for _ in range(200):
        c = generator.choice([0.25, 0.5, 0.75], 90)
        y = (generator.random(90) < c - 0.1).astype(float)
        sums = [(np.mean(y[c == v]), v, (c == v).sum()) for v in np.unique(c)]
        plug_in.append(sum(n / 90 * (a - v) ** 2 for a, v, n in sums))
        estimate = ece(c, y, 3, "mass", debiased=True)
        corrected.append(estimate.value**2 if "clipped" not in estimate.flags else 0.0)
    assert np.mean(plug_in) > 0.015 and np.mean(corrected) == pytest.approx(0.01, abs=0.0015)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.5, 0.5, 0.9]) | st.floats(0, 1), min_size=1, max_size=60),
    st.integers(1, 8),
)
def test_equal_mass_never_splits_equal_confidences(values, bins) -> None:
    group = mass_groups(np.array(values), bins)
    distinct = sorted(set(values))
    of = {v: {int(g) for x, g in zip(values, group, strict=True) if x == v} for v in distinct}
    assert all(len(g) == 1 for g in of.values())
    order = [min(of[v]) for v in distinct]
    assert order == sorted(order) and set(order) == set(range(len(set(order))))
    if len(distinct) <= bins:
        assert len(set(order)) == len(distinct)
    for v in distinct:
        if values.count(v) * bins >= len(values) and len(distinct) > bins:
            assert order.count(min(of[v])) == 1
    edges = make_bins(np.array(values), bins, "mass").edges
    placed = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
    assert placed.tolist() == group.tolist()


def test_equal_mass_without_ties_is_equal() -> None:
    values = np.random.default_rng(0).random(1000)
    counts = np.bincount(mass_groups(values, 15))
    assert len(counts) == 15 and counts.max() - counts.min() <= 1


def test_null_band_is_the_law_of_calibrated_answers() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.beta(5, 2, 300)
    band = null_band(confidence, resamples=4000)
    drawn = [ece(confidence, generator.random(300) < confidence).value for _ in range(80)]
    assert band.mean == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / math.sqrt(80))
    assert band.ci == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    assert band.p(band.ci[1]) == pytest.approx(0.025, abs=0.005) and band.p(0.0) == 1.0


def test_many_confidences_have_the_same_null_as_few_of_them() -> None:
    confidence = np.random.default_rng(1).random(6000)  # beyond the cells: neighbours share a binomial
    band = null_band(confidence)
    generator = np.random.default_rng(2)
    drawn = []
    for _ in range(300):
        right = (generator.random(6000) < confidence).astype(float)
        bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
        drawn.append(np.abs(np.bincount(bins, weights=right - confidence, minlength=15)).sum() / 6000)
    assert band.mean == pytest.approx(np.mean(drawn), rel=0.03)
    assert band.draws.std() == pytest.approx(np.std(drawn), rel=0.12)


def test_p_tells_calibrated_from_overconfident() -> None:
    generator = np.random.default_rng(3)
    confidence = generator.beta(5, 2, 500)
    values = [ece(confidence, generator.random(500) < confidence).p for _ in range(40)]
    assert np.mean(np.array(values) < 0.05) < 0.15 and 0.3 < np.mean(values) < 0.7
    over = ece(confidence, generator.random(500) < confidence - 0.2)
    assert over.p < 0.002 and over.ci[0] > over.null_mean
    assert over.to_json()["null_mean"] == over.null_mean


def test_the_error_of_ece_is_its_spread_over_new_data() -> None:
    generator = np.random.default_rng(4)
    draws, errors, covered = [], [], 0
    for _ in range(40):
        c = generator.beta(5, 2, 600)
        y = generator.random(600) < c - 0.15
        estimate = ece(c, y)
        draws.append(estimate.value)
        errors.append(estimate.se)
        covered += estimate.ci[0] <= 0.15 <= estimate.ci[1]
    assert np.mean(errors) == pytest.approx(np.std(draws, ddof=1), rel=0.3) and covered >= 34


def test_reliability_diagram_by_hand() -> None:
    confidence, correct = [0.0, 0.25, 0.5, 0.5, 1.0], [0, 0, 1, 0, 1]
    diagram = reliability_diagram(confidence, correct, bins=4)
    assert diagram.edges.tolist() == [0, 0.25, 0.5, 0.75, 1.0] and diagram.n.tolist() == [2, 2, 0, 1]
    assert diagram.acc[[0, 1, 3]].tolist() == [0.0, 0.5, 1.0] and diagram.conf[[0, 1, 3]].tolist() == [
        0.125,
        0.5,
        1.0,
    ]
    assert math.isnan(diagram.acc[2]) and math.isnan(diagram.acc_low[2]) and math.isnan(diagram.null_low[2])
    assert (diagram.acc_low[1], diagram.acc_high[1]) == pytest.approx(wilson([1, 0]).ci)
    assert diagram.null_low[3] == diagram.null_high[3] == 1.0  # confidence 1 promises to be right every time
    assert diagram.null_low[1] == 0 and diagram.null_high[1] == 1


def test_brier_and_nll_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(4), 200)
    y = generator.integers(0, 4, 200)
    assert nll(p, y).value == pytest.approx(log_loss(y, p))
    assert nll(p, y, unit="bits").value == pytest.approx(log_loss(y, p) / math.log(2))
    assert brier_multiclass(p, y).value == pytest.approx(brier_score_loss(y, p, scale_by_half=False))
    c, right = generator.random(200), generator.integers(0, 2, 200)
    assert brier_top(c, right).value == pytest.approx(brier_score_loss(right, c))
    assert nll(c, right).value == pytest.approx(log_loss(right, c))
    two = np.stack([1 - c, c], axis=1)
    assert brier(two, right).value == pytest.approx(2 * brier(c, right).value)
    assert "multiclass" in brier(two, right).method and "top-label" in brier(c, right).method


def test_items_may_differ_in_their_classes() -> None:
    vectors = [[0.5, 0.5], [0.2, 0.3, 0.5], [1.0]]
    assert brier_multiclass(vectors, [0, 2, 0]).value == pytest.approx((0.5 + (0.04 + 0.09 + 0.25) + 0) / 3)
    assert nll(vectors, [0, 2, 0]).value == pytest.approx(2 * math.log(2) / 3)


def test_an_impossible_right_answer_is_clipped_and_counted() -> None:
    estimate = nll([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], [1, 0, 0])
    assert estimate.flags == ("clipped:2",)
    assert estimate.value == pytest.approx((2 * 12 * math.log(10) + math.log(2)) / 3)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.4]], [0], "sum to 0.9, not 1"),
        ([[1.5, -0.5]], [0], r"not all in \[0, 1\]"),
        ([[0.5, math.nan]], [0], r"not all in \[0, 1\]"),
        ([[0.5, 0.5]], [2], "label 2 is none of its 2 classes"),
        ([[0.5, 0.5]], [0.5], "label 0.5 is none"),
        ([[0.5, 0.5]], [0, 1], "1 rows of probabilities but labels of shape"),
    ],
)
def test_bad_class_vectors_are_errors_or_counted(probabilities, labels, message) -> None:
    for metric in (nll, brier_multiclass):
        with pytest.raises(UserError, match=message):
            metric(probabilities, labels)
    if len(labels) == 1:
        kept = nll([*probabilities, [0.5, 0.5]], [*labels, 0], on_invalid="drop")
        assert (kept.value, kept.n, kept.n_dropped) == (math.log(2), 1, 1)


def test_classwise_errors_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(3) * 0.5, 300)
    y = generator.integers(0, 3, 300)
    width, mass = 0.0, 0.0
    for k in range(3):
        hit = (y == k).astype(float)
        width += (
            sum(
                abs(hit[m].mean() - p[m, k].mean()) * len(m) / 300
                for m in filter(None, brute_bins(list(p[:, k]), 10))
            )
            / 3
        )
        used = p[:, k] > 0.01
        order = np.argsort(p[used, k])
        parts = np.array_split(order, 10)
        assert len(np.unique(p[used, k])) == used.sum()
        own = np.bincount(mass_groups(p[used, k], 10))
        assert {len(x) for x in parts} == set(own.tolist())
        sums = np.bincount(mass_groups(p[used, k], 10), weights=hit[used] - p[used, k])
        mass += np.abs(sums).sum() / used.sum() / 3
    assert classwise_ece(p, y, 10).value == pytest.approx(width, abs=1e-12)
    assert tace(p, y, 10).value == pytest.approx(mass, abs=1e-12)
    with pytest.raises(UserError, match="option letters"):
        classwise_ece(p, y, classes=["A", "B", "C"])
    with pytest.raises(UserError, match="same classes on every item"):
        classwise_ece([[0.5, 0.5], [1.0]], [0, 0])
    assert classwise_ece(p, y, classes=["positive", "neutral", "negative"]).n == 300


def test_the_error_of_the_classwise_mean_is_that_of_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(5)
    p = generator.dirichlet(np.ones(3), 400)
    y = np.array([generator.choice(3, p=row) for row in p])
    y[:120] = 0
    estimate = classwise_ece(p, y, 5)
    values = []
    for _ in range(400):
        rows = generator.integers(0, 400, 400)
        gaps = 0.0
        for k in range(3):
            bins = np.clip(np.ceil(p[rows, k] * 5).astype(int) - 1, 0, 4)
            gaps += (
                np.abs(np.bincount(bins, weights=(y[rows] == k) - p[rows, k], minlength=5)).sum() / 400 / 3
            )
        values.append(gaps)
    assert estimate.se == pytest.approx(np.std(values), rel=0.2)


def test_nothing_and_one_item() -> None:
    for estimate in (ece([], []), mce([], []), brier_top([], []), nll([], []), null_band([])):
        assert math.isnan(getattr(estimate, "value", getattr(estimate, "mean", 0.0)))
    assert ece([], []).flags == ("empty",) and math.isnan(ece([], []).p)
    one = ece([0.75], [1])
    assert one.value == 0.25 and one.flags == ("single",) and math.isnan(one.se)
    assert reliability_diagram([], []).n.sum() == 0
    assert math.isnan(classwise_ece(np.empty((0, 3)), []).value)


def test_bad_confidences_are_named() -> None:
    for value in (math.nan, math.inf, -0.1, 1.0000001):
        with pytest.raises(UserError, match=r"confidence\[1\] is .*, not a number in \[0, 1\]"):
            ece([0.5, value], [1, 0])
        kept = ece([0.5, value], [1, 0], on_invalid="drop")
        assert (kept.value, kept.n, kept.n_dropped) == (0.5, 1, 1)
    with pytest.raises(UserError, match=r"correct\[0\] is 0.5, not 0 or 1"):
        ece([0.5], [0.5])
    with pytest.raises(UserError, match="unknown binning scheme 'widht'; did you mean 'width'"):
        ece([0.5], [1], scheme="widht")
    with pytest.raises(UserError, match="bins must be a whole number >= 1, got 0"):
        ece([0.5], [1], bins=0)
    with pytest.raises(UserError, match="2 values of confidence but 1 of correct"):
        ece([0.5, 0.5], [1])
