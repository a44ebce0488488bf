"""Several draws an item, against the mean over every subset."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reason.errors import UserError
from vlm_reason.evaluation.metrics import (
    accuracy,
    best_of_k,
    maj_at_k,
    maj_at_k_judged,
    majority,
    pass_at_k,
    pass_hat_k,
    vote_fraction,
)


def vote(subset: list, weights: list[float], right: set) -> float:
    """Share of right answers among the winners of one subset."""
    total: Counter = Counter()
    for answer, weight in zip(subset, weights, strict=True):
        if answer is not None:
            total[answer] += weight
    top = max(total.values(), default=0)
    winners = {a for a, v in total.items() if v == top and v > 0}
    return len(winners & right) / len(winners) if winners else 0.0


def over_subsets(answers: list, weights: list[float], right: set, k: int) -> float:
    picks = list(itertools.combinations(range(len(answers)), k))
    return sum(vote([answers[i] for i in s], [weights[i] for i in s], right) for s in picks) / len(picks)


ANSWERS = st.lists(st.sampled_from(["a", "a", "b", "c", "d", None]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=80)
@given(ANSWERS, st.sampled_from([{"a"}, {"b"}, {"a", "c"}, {"z"}]), st.data())
def test_maj_at_k_is_the_mean_over_subsets(answers, right, data) -> None:
    k = data.draw(st.integers(1, len(answers)))
    ones = [1.0] * len(answers)
    assert maj_at_k([answers], [right], k).value == pytest.approx(
        over_subsets(answers, ones, right, k), abs=1e-12
    )
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=len(answers), max_size=len(answers))
    )
    weighted = maj_at_k([answers], [right], k, [weights]).value
    assert weighted == pytest.approx(over_subsets(answers, weights, right, k), abs=1e-12)


def test_drawn_subsets_agree_with_all_of_them(monkeypatch) -> None:
    generator = np.random.default_rng(0)
    answers = [list(generator.choice(list("aabbc"), 12)) for _ in range(60)]
    exact = maj_at_k(answers, ["a"] * 60, 6).value
    weights = [[1.0] * 12] * 60
    assert maj_at_k(answers, ["a"] * 60, 6, weights).value == pytest.approx(exact, abs=1e-12)
    monkeypatch.setattr(majority, "ENUMERATED", 10)
    monkeypatch.setattr(majority, "EXACT_SAMPLES", 4)
    for drawn in (maj_at_k(answers, ["a"] * 60, 6), maj_at_k(answers, ["a"] * 60, 6, weights)):
        assert drawn.value != exact and drawn.value == pytest.approx(exact, abs=0.01)
        assert drawn.value != maj_at_k(answers, ["a"] * 60, 6, weights, seed=1).value
    assert maj_at_k(answers, ["a"] * 60, 6, weights) == maj_at_k(answers, ["a"] * 60, 6, weights)


def test_many_samples_are_still_exact() -> None:
    """2 of 64 that say the same against 62 that each say something else: with k = 2 the pair is one of C(64, 2)."""
    answers = ["right", "right", *(f"wrong {i}" for i in range(62))]
    pair, one = 1 / math.comb(64, 2), 2 * 62 / math.comb(64, 2)
    assert maj_at_k([answers], ["right"], 2).value == pytest.approx(pair + one / 2, abs=1e-12)
    assert maj_at_k([answers], ["right"], 64).value == 1.0


def test_an_unread_sample_abstains_and_is_reported() -> None:
    estimate = maj_at_k([[None, None, "7"], [None, None, None]], ["7", "7"], 3)
    assert estimate.value == 0.5 and estimate.flags == ("unparsed",) and estimate.n == 2
    judged = maj_at_k_judged([[None, None, "7"], ["", math.nan, None]], [[0, 0, 1], [0, 0, 0]], 3)
    assert judged.value == 0.5
    codes = np.array([[-1, -1, 3], [-1, -1, -1]])
    assert maj_at_k(codes, np.array([3, 3]), 3).value == 0.5
    votes = vote_fraction([[None, None, "7"], [None, None, None]])
    assert votes.answer == ("7", None) and votes.share.tolist() == [1 / 3, 0.0]
    assert votes.unparsed.tolist() == [2, 3]


def test_ties_are_split_evenly_and_the_first_answer_stands_for_the_vote() -> None:
    assert maj_at_k(["a", "b"], "b", 2).value == 0.5
    votes = vote_fraction([["b", "a", "a", "b"], ["a", "b"]])
    assert votes.answer == ("b", "a") and votes.share.tolist() == [0.5, 0.5]


def test_codes_and_strings_vote_alike() -> None:
    codes = np.random.default_rng(1).integers(-1, 4, (50, 6))
    texts = [[None if c < 0 else f"answer {c}" for c in row] for row in codes]
    for k in (1, 3, 6):
        by_code, by_text = maj_at_k(codes, np.zeros(50, int), k), maj_at_k(texts, ["answer 0"] * 50, k)
        assert by_code == by_text
        judged = maj_at_k_judged(texts, [[t == "answer 0" for t in row] for row in texts], k)
        assert judged.value == pytest.approx(by_text.value)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_over_subsets(draws, data) -> None:
    k = data.draw(st.integers(1, len(draws)))
    total, picks = 0.0, list(itertools.combinations(draws, k))
    for subset in picks:
        top = [right for score, right in subset if score == max(s for s, _ in subset)]
        total += sum(top) / len(top)
    # Ties are averaged over the whole item, so compare with the tie-mean of every draw.
    means = {s: np.mean([r for t, r in draws if t == s]) for s, _ in draws}
    tied = sum(means[max(s for s, _ in subset)] for subset in picks) / len(picks)
    value = best_of_k([[s for s, _ in draws]], [[r for _, r in draws]], k).value
    assert value == pytest.approx(tied, abs=1e-12) and tied == pytest.approx(total / len(picks), abs=1e-12)


def test_best_of_k_without_a_score_or_with_too_few() -> None:
    with pytest.raises(UserError, match=r"scores\[1\] is nan.*on_invalid='drop'"):
        best_of_k([[1.0, math.nan], [0.0, 1.0]], [[1, 0], [0, 1]], 1)
    kept = best_of_k([[1.0, math.nan], [0.0, 1.0]], [[1, 0], [0, 1]], 2, on_invalid="drop")
    assert (kept.value, kept.n, kept.n_dropped, kept.flags) == (1.0, 1, 1, ("single", "dropped"))
    assert best_of_k([[1.0], [0.0, 1.0]], [[1], [0, 1]], 2).n_dropped == 1
    with pytest.raises(UserError, match="item 1 has 2 values in scores but 1 in correct"):
        best_of_k([[1.0], [0.0, 1.0]], [[1], [0]], 1)


@pytest.mark.parametrize("metric", [pass_at_k, pass_hat_k])
def test_more_draws_than_there_are_say_nothing(metric) -> None:
    none = metric([1, 2], [2, 2], 3)
    assert math.isnan(none.value) and none.flags == ("empty",) and (none.n, none.n_dropped) == (0, 2)
    some = metric([3, 2], [4, 2], 3)
    assert some.n == 1 and some.n_dropped == 1 and "dropped" in some.flags
    assert math.isnan(metric([], [], 1).value)
    for correct, total in [([3], [2]), ([-1], [2]), ([0.5], [2]), ([math.nan], [2])]:
        with pytest.raises(UserError):
            metric(correct, total, 1)


def test_pass_at_k_interval_is_over_items() -> None:
    generator = np.random.default_rng(0)
    skill = generator.beta(0.5, 0.5, 2000)
    truth = 1 - np.mean((1 - skill) ** 4)
    hits = 0
    for i in range(100):
        counts = generator.binomial(16, skill[i * 20 : (i + 1) * 20])
        low, high = pass_at_k(counts, [16] * 20, 4).ci
        hits += low <= truth <= high
    assert hits >= 88


def test_accuracy_and_its_intervals() -> None:
    assert accuracy([1] * 30).ci == pytest.approx((0.8865, 1.0), abs=5e-5)
    items = np.repeat(np.arange(50), 4)
    values = np.repeat(np.random.default_rng(0).integers(0, 2, 50), 4)
    assert accuracy(values, items).se == pytest.approx(accuracy(values[::4]).se, rel=0.02)
    assert accuracy(values, [f"p{i}" for i in items]) == accuracy(values, items)
    assert math.isnan(accuracy([]).value) and accuracy([]).flags == ("empty",)
    with pytest.raises(UserError, match=r"correct\[1\] is nan"):
        accuracy([1, math.nan])
    dropped = accuracy([1, math.nan, 0, 7], on_invalid="drop")
    assert (dropped.value, dropped.n, dropped.n_dropped) == (0.5, 2, 2)
    with pytest.raises(UserError, match="3 values of correct but 2 items"):
        accuracy([1, 0, 1], ["a", "b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maj_at_k([["a"], ["b"]], ["a"], 1), "2 items in answers but 1 in gold"),
        (lambda: maj_at_k([["a"]], [None], 1), "without a right answer"),
        (lambda: maj_at_k(["abc"], ["a", "b"], 1), "answers are the samples of one item"),
        (lambda: maj_at_k([["a"]], ["a"], 0), "k must be a whole number >= 1, got 0"),
        (lambda: maj_at_k([["a"]], ["a"], 1, [[-1.0]]), "weights must be >= 0, got -1"),
        (lambda: maj_at_k([["a"]], ["a"], 1, [[math.nan]]), r"weights\[0\] is nan"),
    ],
)
def test_bad_votes_are_refused_in_one_line(call, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
