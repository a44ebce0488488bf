from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test

from vlm_reason.errors import UserError
from vlm_reason.evaluation.metrics import compare, compare_tasks
from vlm_reason.stats import cells, holm, minimum_detectable_effect, resample


def test_recorded_gsm8k_margins() -> None:
    """360 of 1,319 items right only in the first system, 76 only in the second: +0.2153, SE 0.0147, p = 2.9e-45."""
    ids = [f"gsm8k-{i}" for i in range(1319)]
    a = np.array([i < 360 or i >= 800 for i in range(1319)])
    b = np.array([360 <= i < 436 or i >= 800 for i in range(1319)])
    found = compare(a, b, ids, ids)
    assert (
        f"{found.value:.4f}" == "0.2153" and f"{found.se:.4f}" == "0.0147" and f"{found.p:.1e}" == "2.9e-45"
    )
    assert found.test == "mcnemar exact" and (found.wins, found.losses, found.ties) == (360, 76, 883)
    assert found.mde == pytest.approx(minimum_detectable_effect(found.se)) and found.p_holm == found.p
    assert set(found.to_json()) >= {"value", "ci", "p", "mde", "p_holm", "wins"}


def test_joined_on_ids_never_on_positions() -> None:
    generator = np.random.default_rng(0)
    a, b, ids = generator.random(50), generator.random(50), [f"p{i}" for i in range(50)]
    order = generator.permutation(50)
    shuffled = compare(a, b[order], ids, [ids[i] for i in order])
    assert shuffled == compare(a, b, ids, ids)
    assert compare(a, b, np.arange(50), np.arange(50)).value == shuffled.value
    assert compare(a, b[::-1], ids, ids).value == pytest.approx(
        shuffled.value
    )  # a mean does not see positions
    assert compare(a, b[::-1], ids, ids).se != pytest.approx(shuffled.se)  # its error does


def test_several_samples_of_an_item_are_its_mean() -> None:
    found = compare([1, 0, 1, 1], [0, 1], ["x", "x", "y", "y"], ["x", "y"])
    assert found.value == pytest.approx(0.25) and "averaged" in found.flags and found.n == 2
    plain = compare([0.5, 1.0], [0, 1], ["x", "y"], ["x", "y"])
    assert (found.value, found.se) == (plain.value, plain.se)


def test_bca_is_scipys() -> None:
    generator = np.random.default_rng(0)
    d = generator.exponential(size=80) - 0.7
    ids = list(range(80))
    found = compare(d, np.zeros(80), ids, ids, resamples=20_000)
    peer = bootstrap((d,), np.mean, n_resamples=20_000, method="BCa", rng=generator).confidence_interval
    assert found.ci == pytest.approx((peer.low, peer.high), abs=0.05 * found.se)


def test_sign_flips_are_scipys() -> None:
    generator = np.random.default_rng(1)
    d = generator.normal(0.25, 1.0, 60)
    ids = list(range(60))
    peer = permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=generator
    ).pvalue
    assert compare(d, np.zeros(60), ids, ids).p == pytest.approx(peer, abs=0.012)
    few = [0.5, 1.5, 2.5, -0.25]
    exact = permutation_test((np.array(few),), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert compare(few, [0.0] * 4, "abcd", "abcd").p == pytest.approx(exact)  # all 16 signs


def test_tasks_are_adjusted_together() -> None:
    generator = np.random.default_rng(2)
    ids = list(range(200))
    tasks = {
        name: (generator.random(200) < 0.5 + lift, generator.random(200) < 0.5, ids, ids)
        for name, lift in [("none", 0.0), ("some", 0.1), ("much", 0.3)]
    }
    found = compare_tasks({**tasks, "empty": ([], [], [], [])})
    p = [found[name].p for name in tasks]
    assert [found[name].p_holm for name in tasks] == pytest.approx(holm(p)) and math.isnan(
        found["empty"].p_holm
    )
    assert found["some"].p_holm > found["some"].p and found["empty"].flags == ("empty",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [1, 0], ["a"], ["a", "b"]), "0 ids only in the first, 1 only in the second .such as 'b'"),
        (([1, 0], [1], ["a", "b"], ["a"]), "1 ids only in the first, 0 only in the second .such as 'b'"),
        (([1], [1], ["a"], ["b"]), "1 ids only in the first, 1 only in the second"),
        (([1, 0], [1], ["a"], ["a"]), "2 values in a but 1 ids"),
        (([math.nan], [1], ["a"], ["a"]), r"a\[0\] is nan"),
        (([1], [math.inf], ["a"], ["a"]), r"b\[0\] is inf"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        compare(*arguments)


def test_a_resample_of_cells_is_a_resample_of_items() -> None:
    x = np.repeat([0.0, 1.0, 5.0], [10, 30, 60])
    found = cells(x, np.zeros(100))
    weights = resample(found.count, 4000, seed=0)
    assert found.count.tolist() == [10, 30, 60] and (weights.sum(axis=1) == 100).all()
    assert weights.mean(axis=0) == pytest.approx([10, 30, 60], rel=0.05)
    assert np.cov(weights.T)[0, 1] == pytest.approx(-100 * 0.1 * 0.3, rel=0.25)
    alone = resample(np.ones(50, dtype=int), 4000, seed=0)
    assert (alone.sum(axis=1) == 50).all() and alone.var() == pytest.approx(0.98, rel=0.03)


def test_coarse_cells_keep_mass_means_and_ties() -> None:
    generator = np.random.default_rng(0)
    x, y = np.round(generator.random(20_000), 3), generator.random(20_000)
    found = cells(x, y, most=512)
    assert len(found.count) <= 512 and found.count.sum() == 20_000
    assert (found.x * found.count).sum() == pytest.approx(x.sum()) and (
        found.y * found.count
    ).sum() == pytest.approx(y.sum())
    flags = (y > 0.5).astype(float)
    exact = cells(np.round(x, 1), flags)
    pairs = {
        (a, b): int(((np.round(x, 1) == a) & (flags == b)).sum())
        for a, b in zip(exact.x, exact.y, strict=True)
    }
    assert list(pairs.values()) == exact.count.tolist() and sum(pairs.values()) == 20_000
