"""Disagreement between members, entropy within one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import entropy

from vlm_reason.errors import UserError
from vlm_reason.evaluation.metrics import (
    answer_disagreement,
    answer_mutual_information,
    bald_batch,
    disagreement,
    entailment_clusters,
    mutual_information,
    p_true,
    predictive_entropies,
    predictive_entropy,
    semantic_entropies,
    semantic_entropy,
)


def members(seed: int, m: int = 3, n: int = 5, k: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(k), (m, n))


def test_the_split_is_entropies_and_adds_up() -> None:
    p = members(0)
    found = disagreement(p)
    assert found.total == pytest.approx(entropy(p.mean(0), axis=1))
    assert found.aleatoric == pytest.approx(entropy(p, axis=2).mean(0))
    kl = np.mean(
        [entropy(row, p.mean(0), axis=1) for row in p], axis=0
    )  # the same number, as a mean divergence
    assert found.mutual_information == pytest.approx(kl)
    assert mutual_information(p).value == pytest.approx(kl.mean())


def test_members_that_agree_have_none_and_certain_ones_that_differ_have_log_m() -> None:
    same = np.repeat(members(1, 1), 4, axis=0)
    assert (
        mutual_information(same).value == pytest.approx(0.0, abs=1e-12)
        and (disagreement(same).mutual_information >= 0).all()
    )
    one_hot = np.eye(3)[:, None, :]
    assert mutual_information(np.repeat(one_hot, 2, axis=1)).value == pytest.approx(math.log(3))
    assert "single member" in mutual_information(members(2, 1)).flags


def test_rounding_is_clamped_and_more_is_an_error() -> None:
    from vlm_reason.evaluation.metrics.disagreement import clamp

    assert clamp(np.array([-1e-12, 0.3])).tolist() == [0.0, 0.3]
    with pytest.raises(UserError, match="item 1 has the mutual information -1e-08"):
        clamp(np.array([0.3, -1e-8]))


def test_nan_is_no_class() -> None:
    p = members(3)
    p[1, 2, 0] = math.nan
    with pytest.raises(UserError, match="item 2: the probabilities .* of member 1 are not all finite"):
        mutual_information(p)
    with pytest.raises(UserError, match="item 2"):
        disagreement(p)
    kept = mutual_information(p, on_invalid="drop")
    assert (kept.n, kept.n_dropped) == (4, 1)
    assert kept.value == pytest.approx(np.delete(disagreement(members(3)).mutual_information, 2).mean())
    for bad in ([[0.5, 0.6]], [[1.5, -0.5]]):
        with pytest.raises(UserError, match="sum 1"):
            mutual_information([bad])
    with pytest.raises(UserError, match="got the shape"):
        mutual_information([[0.5, 0.5]])
    assert math.isnan(mutual_information(np.empty((2, 0, 3))).value)


def joint_information(p: np.ndarray, items: tuple[int, ...]) -> float:
    states = [
        np.prod([p[:, i, y] for i, y in zip(items, answer, strict=True)], axis=0)
        for answer in itertools.product(range(p.shape[2]), repeat=len(items))
    ]
    return entropy([s.mean() for s in states]) - entropy(p[:, list(items)], axis=2).mean(0).sum()


def test_the_batch_is_greedy_in_joint_information() -> None:
    p = members(4, 4, 7, 3)
    p = np.concatenate([p, p[:, :1]], axis=1)  # a copy of item 0
    chosen: tuple[int, ...] = ()
    for _ in range(4):
        gains = {i: joint_information(p, (*chosen, i)) for i in range(8) if i not in chosen}
        chosen += (max(gains, key=lambda i: (round(gains[i], 9), -i)),)
    assert bald_batch(p, 4) == chosen
    singles = np.argsort(-disagreement(p).mutual_information, kind="stable")
    assert bald_batch(p, 3, max_states=1) == tuple(singles[:3])
    assert sorted(bald_batch(p, 99)) == list(range(8))


def test_a_copy_is_not_chosen_again_while_something_new_is_left() -> None:
    sharp, blunt = [[0.95, 0.05], [0.05, 0.95]], [[0.9, 0.1], [0.1, 0.9]]
    halves = [sharp[0], sharp[0], sharp[1], sharp[1]]
    p = np.array([halves, halves, [blunt[0], blunt[1], blunt[0], blunt[1]]]).swapaxes(0, 1)
    singles = disagreement(p).mutual_information
    assert singles[0] == singles[1] > singles[2] and bald_batch(p, 2) == (0, 2)


def test_answers_of_members_by_hand() -> None:
    found = answer_disagreement([[["a", "a"], ["b", "b"]], [["a", "b"], ["a", "b"]], [["c"], ["c"]]])
    assert found.total == pytest.approx([math.log(2), math.log(2), 0.0])
    assert found.aleatoric == pytest.approx([0.0, math.log(2), 0.0])
    assert found.mutual_information == pytest.approx([math.log(2), 0.0, 0.0])
    # (K - 1) / (2 S_all) - mean (K_m - 1) / (2 S_m): 1/8 - 0, 1/8 - 1/4, 0
    assert found.miller_madow == pytest.approx([math.log(2) + 0.125, -0.125, 0.0])
    # of the 6 deals of a, a, b, b to two members, 2 give log 2 and 4 give 0
    assert found.null_mean[:2] == pytest.approx([math.log(2) / 3] * 2, abs=0.12) and found.null_mean[2] == 0
    assert found.p[0] == pytest.approx(1 / 3, abs=0.12) and found.p[1] == found.p[2] == 1.0


def test_miller_madow_takes_away_most_of_the_bias() -> None:
    """The plug-in bias of samples of one model is about (K - 1)(1 - 1/M) / (2 S)."""
    generator = np.random.default_rng(0)
    answers = [[[str(x) for x in generator.integers(0, 3, 16)] for _ in range(4)] for _ in range(400)]
    found = answer_disagreement(answers)
    assert found.mutual_information.mean() == pytest.approx(2 * 0.75 / 32, rel=0.1)
    assert abs(found.miller_madow.mean()) < 0.004
    assert found.null_mean.mean() == pytest.approx(found.mutual_information.mean(), rel=0.05)


def test_p_of_the_mean_is_uniform_without_disagreement_and_small_with_it() -> None:
    generator = np.random.default_rng(1)
    values = []
    for seed in range(60):
        answers = [[[str(x) for x in generator.integers(0, 3, 4)] for _ in range(3)] for _ in range(40)]
        values.append(answer_mutual_information(answers, resamples=50, seed=seed).p)
    assert np.mean(np.array(values) < 0.05) <= 0.15 and 0.35 < np.mean(values) < 0.65
    split = [[["a"] * 4, ["b"] * 4, ["a", "b"] * 2]] * 20
    assert answer_mutual_information(split).p < 1e-6


def test_an_unread_answer_is_an_answer_of_its_own_kind() -> None:
    found = answer_disagreement([[["a", "a"], [None, None]]])
    assert found.mutual_information == pytest.approx([math.log(2)]) and found.unparsed.tolist() == [2]
    assert "unparsed" in answer_mutual_information([[["a", "a"], [None, None]]] * 2).flags
    with pytest.raises(UserError, match="member 1 of item 0 has no answers"):
        answer_disagreement([[["a"], []]])
    with pytest.raises(UserError, match="item 0 has no members"):
        answer_disagreement([[]])
    assert math.isnan(answer_mutual_information([]).value)


def test_discrete_semantic_entropy() -> None:
    values = semantic_entropies([["a", "a", "b", "b"], ["a"] * 3, [None, None, "a"], []])
    assert values[:3] == pytest.approx([math.log(2), 0.0, math.log(3)]) and math.isnan(values[3])
    assert semantic_entropy(["a", "a", "b", "b"]).value == pytest.approx(math.log(2))
    assert semantic_entropy([["a", "b"], ["a", "a"]]).value == pytest.approx(math.log(2) / 2)
    codes = np.array([[0, 0, 1, 1], [-1, -1, 2, 2]])
    assert semantic_entropies(codes) == pytest.approx([math.log(2), entropy([0.5, 0.25, 0.25])])
    assert math.isnan(semantic_entropy([]).value)


def test_rao_semantic_entropy_counts_each_string_once() -> None:
    logp = np.log([0.3, 0.3, 0.2, 0.1])
    found = semantic_entropies([["a", "a", "a", "b"]], [logp], [["1", "1", "1.0", "2"]])
    assert found == pytest.approx([entropy([0.5, 0.1])])  # 0.3 + 0.2 against 0.1, not 0.8 against 0.1
    far = semantic_entropies([["a", "b"]], [[-5000.0, -5001.0]], [["x", "y"]])
    assert far == pytest.approx([entropy([1, math.exp(-1)])])
    unread = semantic_entropies([[None, None, None]], [np.log([0.2, 0.2, 0.2])], [["x", "y", "x"]])
    assert unread == pytest.approx([math.log(2)])
    with pytest.raises(UserError, match="needs the strings"):
        semantic_entropies([["a"]], [[-1.0]])
    with pytest.raises(UserError, match="must be finite and <= 0"):
        semantic_entropies([["a"]], [[0.5]], [["x"]])


def test_predictive_entropy_with_and_without_length() -> None:
    logps, lengths = [[-2.0, -4.0], [-3.0]], [[2, 8], [3]]
    assert predictive_entropies(logps) == pytest.approx([3.0, 3.0])
    assert predictive_entropies(logps, lengths) == pytest.approx([0.75, 1.0])
    assert (
        predictive_entropy([-2.0, -4.0]).value == 3.0 and "a token" in predictive_entropy([-2.0], [2]).method
    )
    p = np.array([0.7, 0.2, 0.1])
    draws = np.random.default_rng(0).choice(3, 40_000, p=p)
    assert predictive_entropy(np.log(p)[draws]).value == pytest.approx(entropy(p), abs=0.01)
    for bad in (math.nan, -math.inf, 0.5):
        with pytest.raises(UserError, match="item 0 has the log-probability"):
            predictive_entropies([[bad]])
    with pytest.raises(UserError, match="lengths must be > 0"):
        predictive_entropies([[-1.0]], [[0]])


def test_clusters_need_entailment_both_ways_and_no_order() -> None:
    generator = np.random.default_rng(0)
    entails = generator.random((9, 9)) < 0.35
    clusters = entailment_clusters(entails)
    order = generator.permutation(9)
    shuffled = entailment_clusters(entails[np.ix_(order, order)])
    together = clusters[:, None] == clusters[None, :]
    assert (together[np.ix_(order, order)] == (shuffled[:, None] == shuffled[None, :])).all()
    one_way = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert entailment_clusters(one_way).tolist() == [0, 1, 2]
    chain = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    assert entailment_clusters(chain).tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="square"):
        entailment_clusters([[1, 0]])


def test_p_true_sums_forms_and_averages_orders() -> None:
    true = np.log([[[0.3, 0.1], [0.2, 0.0 + 1e-300]]])
    false = np.log([[[0.4], [0.6]]])
    assert p_true(true, false) == pytest.approx([(0.4 / 0.8 + 0.2 / 0.8) / 2])
    with pytest.raises(UserError, match="no probability on either"):
        p_true(np.full((1, 1, 1), -np.inf), np.full((1, 1, 1), -np.inf))
    with pytest.raises(UserError, match="not a log-probability"):
        p_true(np.full((1, 1, 1), math.nan), np.zeros((1, 1, 1)))
    with pytest.raises(UserError, match=r"\[items, orders, forms\]"):
        p_true([0.0], [0.0])
