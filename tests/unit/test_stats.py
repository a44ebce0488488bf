from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from vlm_reason.errors import UserError
from vlm_reason.stats import (
    clustered,
    clustered_share,
    holm,
    mean_interval,
    minimum_detectable_effect,
    paired_difference,
    wilson,
)


def test_wilson_keeps_its_width_when_all_are_right() -> None:
    estimate = wilson([1] * 30)
    assert estimate.value == 1.0 and estimate.ci == pytest.approx((0.8865, 1.0), abs=5e-5)


@given(st.integers(1, 200), st.data())
def test_wilson_is_the_closed_form_and_symmetric(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    estimate, mirror = wilson([1] * right + [0] * (n - right)), wilson([0] * right + [1] * (n - right))
    z, p = scipy_stats.norm.ppf(0.975), right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert estimate.ci == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-9)
    assert mirror.ci == pytest.approx((1 - estimate.ci[1], 1 - estimate.ci[0]), abs=1e-9)


@pytest.mark.parametrize("right", [1, 3, 5])
def test_items_of_one_share_keep_a_width_whatever_rounds(right: int) -> None:
    """Of three items with 1 of 10 right each the mean is not 0.1 to the last bit; the spread is 0 all the same."""
    estimate = clustered_share([right / 10] * 3, [0, 1, 2])
    assert estimate.se == 0.0 and "degenerate" in estimate.flags
    assert estimate.ci[1] - estimate.ci[0] > 0.3


def test_wilson_refuses_shares() -> None:
    with pytest.raises(ValueError, match=r"0/1 items, got 0\.5"):
        wilson([0.5])


def test_mean_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    estimate = mean_interval(values)
    low, high = scipy_stats.t.interval(0.95, 3, loc=4.0, scale=scipy_stats.sem(values))
    assert estimate.value == 4.0 and estimate.ci == pytest.approx((low, high)) and estimate.n == 4


@pytest.mark.parametrize(
    "estimate", [mean_interval([]), wilson([]), clustered([], []), paired_difference({}, {})]
)
def test_nothing_in_is_nan_with_a_flag(estimate) -> None:
    assert math.isnan(estimate.value) and all(map(math.isnan, estimate.ci))
    assert estimate.n == 0 and estimate.flags == ("empty",)


def test_one_value_has_no_error_and_a_constant_is_flagged() -> None:
    assert mean_interval([3.0]).flags == ("single",) and math.isnan(mean_interval([3.0]).se)
    assert mean_interval([3.0, 3.0]).flags == ("degenerate",)
    assert clustered([1, 0], ["a", "a"]).flags == ("single",)


def test_values_that_are_not_finite_raise_or_are_counted() -> None:
    with pytest.raises(ValueError, match="value 1 is nan"):
        mean_interval([1.0, math.nan])
    estimate = mean_interval([1.0, math.nan, 3.0, math.inf], on_invalid="drop")
    assert (estimate.value, estimate.n, estimate.n_dropped) == (2.0, 2, 2)
    assert clustered([1.0, math.nan, 0.0], ["a", "b", "c"], on_invalid="drop").value == 0.5


def test_clustered_error_by_hand_and_its_two_limits() -> None:
    # clusters (1, 1) and (1, 0): mean 3/4, cluster sums of residuals 1/2 and -1/2, SE = sqrt(2 (1/4 + 1/4)) / 4
    assert clustered([1, 1, 1, 0], ["a", "a", "b", "b"]).se == pytest.approx(0.25)
    values = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    alone = clustered(values, list(range(60)))
    assert alone.se == pytest.approx(
        mean_interval(values).se
    )  # every item its own cluster: the ordinary error
    copies = clustered(np.repeat(values, 7), list(np.repeat(np.arange(60), 7)))
    assert copies.se == pytest.approx(alone.se)  # copies of an item add no information
    with pytest.raises(ValueError, match="2 values but 1 cluster"):
        clustered([1, 2], ["a"])


def test_paired_difference_on_recorded_gsm8k_margins() -> None:
    # 1319 items, 360 right only in the first system and 76 only in the second: published +0.2153, SE 0.0147.
    a = {str(i): float(i < 360 or i >= 800) for i in range(1319)}
    b = {str(i): float(360 <= i < 436 or i >= 800) for i in range(1319)}
    estimate = paired_difference(a, b)
    assert estimate.value == pytest.approx(284 / 1319)
    assert estimate.se == pytest.approx(0.0147, abs=5e-5)
    assert estimate.p == pytest.approx(2.9e-45, rel=0.01) and estimate.test == "mcnemar exact"
    assert (estimate.wins, estimate.losses, estimate.ties) == (360, 76, 883)
    normal = estimate.value - 1.96 * estimate.se, estimate.value + 1.96 * estimate.se
    assert estimate.ci == pytest.approx(normal, abs=0.2 * estimate.se)  # 2,000 resamples
    assert paired_difference(a, b) == estimate  # seeded
    assert paired_difference(dict(reversed(a.items())), b) == estimate  # joined on ids, not on positions
    back = paired_difference(b, a)
    assert back.value == -estimate.value and back.p == estimate.p
    assert estimate.to_json()["p"] == estimate.p


def test_sign_flip_matches_enumeration() -> None:
    a = {"a": 0.5, "b": 1.5, "c": 2.5, "d": -0.25}
    b = dict.fromkeys(a, 0.0)
    differences = np.array(list(a.values()))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    exact = np.mean(np.abs(differences @ signs) >= abs(differences.sum()))
    estimate = paired_difference(a, b)
    assert estimate.test == "sign flip" and estimate.p == pytest.approx(exact, abs=0.015)


def test_different_items_are_refused() -> None:
    with pytest.raises(UserError, match="1 ids only in the first, 2 only in the second"):
        paired_difference({"a": 1, "b": 1}, {"b": 1, "c": 0, "d": 0})


def test_equal_systems_have_width_zero_and_p_one() -> None:
    estimate = paired_difference({"a": 1, "b": 0}, {"a": 1, "b": 0})
    assert estimate.ci == (0.0, 0.0) and estimate.flags == ("degenerate",) and estimate.p == 1.0
    assert paired_difference({"a": 1.0}, {"a": 0.0}).flags == ("single",)
    with pytest.raises(ValueError, match="not finite"):
        paired_difference({"a": math.nan}, {"a": 0})


def test_bootstrap_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        draws = generator.normal(0.3, 1.0, 40)
        a = {str(i): float(v) for i, v in enumerate(draws)}
        low, high = paired_difference(a, dict.fromkeys(a, 0.0), resamples=400).ci
        hits += low <= 0.3 <= high
    assert 88 <= hits <= 100


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_minimum_detectable_effect_has_the_stated_power() -> None:
    effect = minimum_detectable_effect(0.02)
    assert scipy_stats.norm.sf(scipy_stats.norm.ppf(0.975) - effect / 0.02) == pytest.approx(0.8)


def test_clustered_share_is_wilson_when_every_item_stands_alone() -> None:
    values = [1.0] * 300 + [0.0] * 100
    alone, plain = clustered_share(values, list(range(400))), wilson(values)
    assert alone.ci == pytest.approx(plain.ci, abs=1e-3)  # they differ by the t quantile and n - 1
    copies = clustered_share(np.repeat(values, 5), list(np.repeat(np.arange(400), 5)))
    assert copies.ci == pytest.approx(alone.ci, abs=1e-9)


def test_clustered_share_keeps_its_width_where_all_are_wrong() -> None:
    estimate = clustered_share([0.0] * 40, [i // 4 for i in range(40)])
    assert estimate.value == 0 and estimate.flags == ("degenerate",)
    assert estimate.ci[0] == 0 and estimate.ci[1] > wilson([0] * 10).ci[1] > 0.25  # ten items, not forty
    with pytest.raises(ValueError, match=r"shares must be in \[0, 1\]"):
        clustered_share([2.0, 0.0], ["a", "b"])


def test_clustered_share_covers_a_small_probability() -> None:
    generator = np.random.default_rng(3)
    share, t_interval, runs = 0, 0, 400
    for _ in range(runs):
        p = generator.beta(0.2, 3.8, size=40)  # mean 0.05; most items hopeless, a few easy
        values = generator.random((40, 8)) < p[:, None]
        items = list(np.repeat(np.arange(40), 8))
        for count, interval in ((0, clustered_share), (1, clustered)):
            low, high = interval(values.ravel().astype(float), items).ci
            if count == 0:
                share += low <= 0.05 <= high
            else:
                t_interval += low <= 0.05 <= high
    assert share / runs >= 0.92 and share > t_interval
