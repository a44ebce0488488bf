"""Figures known for real recorded samples, to the printed digit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.unit.recorded_math import Recorded, recorded, winner_is_right
from vlm_reason.evaluation import metrics


@pytest.fixture(scope="module")
def data(shared_data) -> Recorded:
    return recorded(shared_data)


@pytest.fixture(scope="module")
def votes(data):
    found = metrics.vote_fraction(data.answers)
    return found.share, winner_is_right(data, found.answer)


def printed(value: float, like: str) -> str:
    return f"{value:.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize(("k", "golden"), [(1, "0.9100"), (8, "0.9600")])
def test_pass_at_k(data, k, golden) -> None:
    counts = [sum(c) for c in data.correct]
    assert printed(metrics.pass_at_k(counts, [8] * 100, k).value, golden) == golden


@pytest.mark.parametrize(("k", "golden"), [(1, "0.9100"), (3, "0.9160"), (5, "0.9213"), (8, "0.9250")])
def test_maj_at_k(data, k, golden) -> None:
    judged = metrics.maj_at_k_judged(data.answers, data.correct, k)
    right = [
        {a for a, c in zip(x, y, strict=True) if c} or {"?"}
        for x, y in zip(data.answers, data.correct, strict=True)
    ]
    assert printed(judged.value, golden) == golden
    assert metrics.maj_at_k(data.answers, right, k).value == pytest.approx(judged.value, abs=1e-12)
    equal = metrics.maj_at_k_judged(data.answers, data.correct, k, [[0.3] * 8] * 100)
    assert equal.value == pytest.approx(judged.value, abs=1e-12)


@pytest.mark.parametrize(("k", "golden"), [(1, "0.9100"), (2, "0.9279"), (4, "0.9361"), (8, "0.9400")])
def test_reward_best_of_k(data, k, golden) -> None:
    assert printed(metrics.best_of_k(data.reward, data.correct, k).value, golden) == golden


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_calibration_of_vote_fractions(votes, scheme) -> None:
    share, right = votes
    worst = metrics.mce(share, right, scheme=scheme)
    assert printed(metrics.ece(share, right, scheme=scheme).value, "0.0500") == "0.0500"
    assert printed(metrics.ece(share, right, scheme=scheme, debiased=True).value, "0.0459") == "0.0459"
    assert printed(worst.value, "0.625") == "0.625" and worst.bin_n == 1
    assert printed(metrics.brier_top(share, right).value, "0.0419") == "0.0419"


def test_a_quantile_split_of_vote_fractions_would_have_read_half(votes) -> None:
    share, right = votes
    order = np.argsort(share, kind="stable")
    plain = sum(abs(right[b].sum() - share[b].sum()) for b in np.array_split(order, 15)) / 100
    assert plain < 0.04 and metrics.ece(share, right, scheme="mass").value == pytest.approx(0.05, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "golden"), [("aurc", "0.02481"), ("e_aurc", "0.02195"), ("augrc", "0.01350"), ("prr", "0.6731")]
)
def test_selective_prediction(votes, name, golden) -> None:
    share, right = votes
    assert printed(getattr(metrics, name)(1 - share, 1 - right).value, golden) == golden


def test_failure_prediction(data, votes) -> None:
    share, right = votes
    entropy = metrics.semantic_entropies(data.answers)
    assert printed(metrics.auroc(1 - share, 1 - right).value, "0.8356") == "0.8356"
    assert printed(metrics.auroc(entropy, 1 - right).value, "0.8295") == "0.8295"
    assert printed(metrics.prr(entropy, 1 - right).value, "0.6666") == "0.6666"


def test_prr_is_the_one_with_random_shuffles_in_expectation(votes) -> None:
    """lm-polygraph measures areas of 1 - risk against the mean of shuffled orders; here the shuffles are exact."""
    share, right = votes
    uncertainty, loss = 1 - share, 1 - right
    generator = np.random.default_rng(0)
    rank = np.arange(1, 101)

    def area(order):
        return 1 - np.mean(np.cumsum(loss[order]) / rank)

    shuffled = np.mean([area(generator.permutation(100)) for _ in range(4000)])
    tied = np.mean([area(np.lexsort((generator.random(100), uncertainty))) for _ in range(4000)])
    peer = (tied - shuffled) / (area(np.argsort(loss)) - shuffled)
    assert metrics.prr(uncertainty, loss).value == pytest.approx(peer, abs=0.01)


def test_aurc_by_row_order_would_be_anything(votes) -> None:
    share, right = votes
    uncertainty, loss, values = 1 - share, 1 - right, []
    for order in (np.argsort(loss), np.argsort(-loss)):
        rows = order[np.argsort(uncertainty[order], kind="stable")]
        values.append(np.mean(np.cumsum(loss[rows]) / np.arange(1, 101)))
        assert metrics.aurc(uncertainty[order], loss[order]).value == pytest.approx(0.0248062, abs=1e-7)
    assert values[0] < 0.006 and values[1] > 0.096
    curve = metrics.risk_coverage(uncertainty, loss)
    assert (curve.tie_low.mean(), curve.tie_high.mean()) == pytest.approx(values)


def test_calibrated_answers_read_more_than_zero() -> None:
    """About 0.105, 0.048 and 0.024 at n = 100, 500, 2000: what any ECE has to be compared with."""
    for n, golden in [(100, 0.105), (500, 0.048), (2000, 0.024)]:
        confidence = np.random.default_rng(n).beta(5, 2, n)
        assert metrics.null_band(confidence).mean == pytest.approx(golden, rel=0.08)


def test_maj_at_k_is_the_mean_over_all_subsets(data) -> None:
    answers, correct = data.answers[28], data.correct[28]
    right = {a for a, c in zip(answers, correct, strict=True) if c}
    for k in (2, 5):
        total, subsets = 0.0, list(itertools.combinations(answers, k))
        for subset in subsets:
            top = max(subset.count(a) for a in subset)
            winners = {a for a in subset if subset.count(a) == top}
            total += len(winners & right) / len(winners)
        assert metrics.maj_at_k(answers, right, k).value == pytest.approx(total / len(subsets), abs=1e-12)
