"""Mistakes that evaluation tools are known to make, one test each: they must not happen here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlm_reason.errors import UserError
from vlm_reason.evaluation import metrics
from vlm_reason.stats import clustered


def test_nan_is_never_scored_as_a_class() -> None:
    """argmax of NaN is 0: a model that returns only NaN would score the share of label 0."""
    rows = np.full((50, 4), math.nan)
    for metric in (metrics.nll, metrics.brier_multiclass, metrics.classwise_ece, metrics.tace):
        with pytest.raises(UserError, match=r"not all in \[0, 1\]"):
            metric(rows, np.zeros(50))
        dropped = metric(rows, np.zeros(50), on_invalid="drop")
        assert math.isnan(dropped.value) and (dropped.n, dropped.n_dropped) == (0, 50)
    with pytest.raises(UserError, match="not all finite"):
        metrics.mutual_information(rows[None])
    with pytest.raises(UserError, match=r"not all in \[0, 1\]"):
        metrics.conformal(rows, np.zeros(50), rows, np.zeros(50))


def test_nan_uncertainty_is_never_the_most_certain() -> None:
    with pytest.raises(UserError, match=r"uncertainty\[0\] is nan"):
        metrics.aurc([math.nan, 0.5, 0.6], [1, 0, 0])
    kept = metrics.aurc([math.nan, 0.5, 0.6], [1, 0, 0], on_invalid="drop")
    assert kept.value == 0.0 and kept.n_dropped == 1


def test_confidence_one_has_no_bin_of_its_own() -> None:
    """Half-open bins [a, b) leave 1.0 to a sixteenth bin, and ECE reads something else."""
    confidence, correct = [0.95, 1.0, 1.0], [1, 0, 1]
    together = abs(2 / 3 - np.mean(confidence))
    apart = 1 / 3 * 0.05 + 2 / 3 * 0.5
    assert metrics.ece(confidence, correct, bins=10).value == pytest.approx(together)
    assert together < apart - 0.02
    diagram = metrics.reliability_diagram(confidence, correct, bins=10)
    assert len(diagram.n) == 10 and diagram.n[-1] == 3


def test_confidence_zero_is_in_the_first_bin_and_edges_close_on_the_right() -> None:
    diagram = metrics.reliability_diagram([0.0, 0.1, 0.1 + 1e-9, 1.0], [0, 0, 0, 1], bins=10)
    assert diagram.n[0] == 2 and diagram.n[1] == 1 and diagram.n[9] == 1 and diagram.n.sum() == 4
    for bins in (3, 7, 15, 49):
        edges = [b / bins for b in range(bins + 1)]
        assert metrics.reliability_diagram(edges, [0] * len(edges), bins=bins).n.tolist() == [2] + [1] * (
            bins - 1
        )


@pytest.mark.parametrize("name", ["aurc", "e_aurc", "augrc", "prr", "auroc", "aupr", "fpr_at_95"])
def test_no_number_depends_on_the_order_of_the_rows(name) -> None:
    generator = np.random.default_rng(0)
    uncertainty = generator.integers(0, 3, 60) / 3  # heavily tied, as vote fractions are
    loss = generator.integers(0, 2, 60)
    value = getattr(metrics, name)(uncertainty, loss).value
    for order in [np.argsort(loss), np.argsort(-loss), generator.permutation(60)]:
        assert getattr(metrics, name)(uncertainty[order], loss[order]).value == pytest.approx(
            value, abs=1e-12
        )


@pytest.mark.parametrize("name", ["ece", "mce", "brier_top", "nll"])
@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_no_calibration_number_depends_on_the_order_of_the_rows(name, scheme) -> None:
    generator = np.random.default_rng(0)
    confidence, correct = generator.integers(0, 9, 80) / 8, generator.integers(0, 2, 80)
    options = {"bins": 4, "scheme": scheme} if name in ("ece", "mce") else {}
    value = getattr(metrics, name)(confidence, correct, **options).value
    order = generator.permutation(80)
    assert getattr(metrics, name)(confidence[order], correct[order], **options).value == pytest.approx(
        value, abs=1e-12
    )


def test_all_right_or_all_wrong_is_not_half() -> None:
    """Scaling a constant to [0, 1] gives an AURC of 0.5 both for a perfect and for a hopeless model."""
    certain = np.full(20, 0.3)
    assert (
        metrics.aurc(certain, np.zeros(20)).value == 0.0 and metrics.aurc(certain, np.ones(20)).value == 1.0
    )
    for loss in (np.zeros(20), np.ones(20)):
        ratio = metrics.prr(np.arange(20), loss)
        assert math.isnan(ratio.value) and ratio.flags == ("one class",)


def test_the_bootstrap_has_the_spread_of_the_statistic() -> None:
    """Not the error of the mean of the replicates, which shrinks with their number: 0.00079 in place of 0.0250."""
    loss = (np.random.default_rng(0).random(400) < 0.5).astype(float)
    constant = np.zeros(400)  # with no ranking at all, AURC is about the mean loss, whose error is known
    estimate = metrics.aurc(constant, loss)
    assert estimate.value == pytest.approx(loss.mean())
    assert estimate.se == pytest.approx(math.sqrt(0.25 / 400), rel=0.08)
    assert estimate.ci[1] - estimate.ci[0] == pytest.approx(2 * 1.96 * estimate.se, rel=0.08)


def test_several_samples_of_an_item_do_not_shrink_the_error() -> None:
    right = np.random.default_rng(0).integers(0, 2, 100)
    many, items = np.repeat(right, 100), np.repeat(np.arange(100), 100)
    naive, honest = metrics.accuracy(many), metrics.accuracy(many, items)
    assert honest.se == pytest.approx(10 * naive.se, rel=0.02)
    assert clustered(many, items).se == pytest.approx(honest.se)


def test_none_right_of_five_has_an_interval() -> None:
    for estimate in (metrics.accuracy([0] * 5), metrics.pass_at_k([0] * 5, [4] * 5, 2)):
        assert estimate.value == 0.0 and estimate.ci[0] == 0.0 and 0.3 < estimate.ci[1] < 0.7


def test_different_items_are_never_compared() -> None:
    with pytest.raises(UserError, match="not run on the same items"):
        metrics.compare([1, 0, 1], [1, 0, 1], ["a", "b", "c"], ["a", "b", "d"])


def test_unread_answers_never_win_and_are_counted() -> None:
    """Three unreadable answers outvoting two readable ones made "[invalid]" the winner."""
    answers = [[None, None, None, "7", "7"]]
    votes = metrics.vote_fraction(answers)
    assert votes.answer == ("7",) and votes.share.tolist() == [0.4] and votes.unparsed.tolist() == [3]
    estimate = metrics.maj_at_k(answers, ["7"], 5)
    assert estimate.value == 1.0 and "unparsed" in estimate.flags
    hopeless = metrics.maj_at_k([[None] * 5], ["7"], 5)
    assert hopeless.value == 0.0 and hopeless.n == 1 and "unparsed" in hopeless.flags
    for nothing in (None, "", math.nan):
        with pytest.raises(UserError, match="without a right answer"):
            metrics.maj_at_k([[None] * 5], [nothing], 5)


def test_unread_answers_do_not_look_certain() -> None:
    """One cluster of unreadable answers would have entropy 0, the most certain item of all."""
    assert metrics.semantic_entropies([[None] * 4, ["a"] * 4]) == pytest.approx([math.log(4), 0.0])


def test_unread_answers_are_in_no_conformal_set() -> None:
    answers = [["a", None, None, None]] * 30
    found = metrics.conformal_answers(answers, ["a"] * 30, answers, ["a"] * 30, alpha=0.1)
    assert found.quantile == 0.75 and set(found.sets) == {("a",)}


def test_pass_at_k_uses_the_samples_of_each_item() -> None:
    """n is not taken from the first item, and k > n is neither 1 nor "any of n"."""
    estimate = metrics.pass_at_k([1, 1], [2, 4], 2)
    assert estimate.value == pytest.approx((1.0 + 0.5) / 2)
    assert math.isnan(metrics.pass_at_k_of_item(2, 2, 3))


def test_more_bins_than_items_is_a_number() -> None:
    for scheme in ("width", "mass"):
        assert metrics.ece([0.2, 0.9], [0, 1], bins=100, scheme=scheme).value == pytest.approx(0.15)
    assert metrics.tace([[0.2, 0.8]], [1], bins=100).value == pytest.approx(0.2)


def test_out_of_range_labels_are_errors_in_every_metric() -> None:
    p = [[0.5, 0.5], [0.9, 0.1]]
    for metric in (metrics.nll, metrics.brier, metrics.brier_multiclass, metrics.classwise_ece):
        with pytest.raises(UserError, match="label 2 is none of its 2 classes"):
            metric(p, [0, 2])


def test_nothing_is_nan_and_flagged_never_zero() -> None:
    nothing = [
        metrics.accuracy([]),
        metrics.pass_at_k([], [], 1),
        metrics.pass_hat_k([], [], 1),
        metrics.maj_at_k([], [], 1),
        metrics.maj_at_k_judged([], [], 1),
        metrics.best_of_k([], [], 1),
        metrics.nll([], []),
        metrics.brier([], []),
        metrics.brier_multiclass([], []),
        metrics.ece([], []),
        metrics.ece([], [], scheme="mass", debiased=True),
        metrics.mce([], []),
        metrics.classwise_ece(np.empty((0, 3)), []),
        metrics.aurc([], []),
        metrics.prr([], []),
        metrics.risk_at_coverage([], [], 0.5),
        metrics.coverage_at_risk([], [], 0.5),
        metrics.auroc([], []),
        metrics.aupr([], []),
        metrics.fpr_at_95([], []),
        metrics.mutual_information(np.empty((3, 0, 4))),
        metrics.answer_mutual_information([]),
        metrics.predictive_entropy([]),
        metrics.semantic_entropy([]),
        metrics.compare([], [], [], []),
        metrics.conformal(np.empty((0, 3)), [], np.empty((0, 3)), []).coverage,
    ]
    for estimate in nothing:
        assert math.isnan(estimate.value) and "empty" in estimate.flags and estimate.n == 0
        assert all(map(math.isnan, estimate.ci)) and math.isnan(estimate.se)


def test_dropped_items_are_counted_in_every_metric() -> None:
    bad, p = math.nan, [[0.5, 0.5], [0.9, 0.1], [0.2, math.nan]]
    dropping = {"on_invalid": "drop"}
    found = [
        metrics.pass_at_k([1, bad, 2], [2, 2, 2], 2, **dropping),
        metrics.maj_at_k([["a"], ["b"], ["a"]], ["a"] * 3, 1, [[1.0], [1.0], [bad]], **dropping),
        metrics.maj_at_k_judged([["a"], ["b"], ["a"]], [[1], [0], [bad]], 1, **dropping),
        metrics.best_of_k([[1.0], [2.0], [None]], [[1], [0], [1]], 1, **dropping),
        metrics.compare([1, 0, bad], [0, 0, 1], "xyz", "zyx", **dropping),
        metrics.conformal([[0.5, 0.5]] * 9, [0] * 9, p, [0, 0, 0], 0.2, **dropping).coverage,
        metrics.nll(p, [0, 0, 0], **dropping),
    ]
    assert [(e.n, e.n_dropped) for e in found] == [(2, 1)] * 7
    assert [round(e.value, 6) for e in found[:5]] == [1.0, 0.5, 0.5, 0.5, 0.0]
    with pytest.raises(UserError, match=r"weights\[2\] is nan"):
        metrics.maj_at_k([["a"]] * 3, ["a"] * 3, 1, [[1.0], [1.0], [bad]])
    with pytest.raises(UserError, match=r"scores\[0\] is nan"):
        metrics.best_of_k([[None]], [[1]], 1)


def test_an_item_without_samples_is_named() -> None:
    with pytest.raises(UserError, match="item 1 has no samples"):
        metrics.semantic_entropy([["1", "2"], []])
    assert metrics.semantic_entropy([["1", "2"], []], on_invalid="drop").n_dropped == 1
