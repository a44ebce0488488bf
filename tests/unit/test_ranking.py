from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_reason.engines.base import Law, ScoreRequest
from vlm_reason.errors import UserError
from vlm_reason.ranking import METHODS, Candidates, candidates_from_records, rank, score_matrices
from vlm_reason.ranking.mixture import log_marginal
from vlm_reason.store import SampleRecord

INF = math.inf


def candidates(**changes: object) -> Candidates:
    """Four rationales and three strings; "8" and "8.0" are one class. The third rationale is short and likely, and
    says 15; the fourth was cut."""
    base = Candidates(
        problem_id="p",
        answers=("8", "15", "8.0"),
        classes=("8", "15", "8"),
        chosen=(0, 2, 1, -1),
        logp_answer=np.array(
            [
                [math.log(0.6), math.log(0.1), math.log(0.2)],
                [math.log(0.3), math.log(0.1), math.log(0.5)],
                [math.log(0.2), math.log(0.7), math.log(0.1)],
                [-INF, -INF, -INF],
            ]
        ),
        logp_trace=np.array([-6.0, -5.0, -1.0, -4.0]),
        logp_own=np.array([math.log(0.6), math.log(0.5), math.log(0.7), -INF]),
        length=np.array([12.0, 20.0, 2.0, 30.0]),
    )
    return dataclasses.replace(base, **changes)


def test_majority_counts_canonical_votes() -> None:
    ranking = rank(candidates(), "majority")
    assert ranking.classes == ("8", "15") and ranking.posterior == pytest.approx((2 / 3, 1 / 3))
    assert ranking.rationales == (0, 1, 2, 3)
    assert ranking.rationale_posterior == pytest.approx((0.4, 0.4, 0.2, 0.0))
    assert ranking.abstained == 1 and ranking.answer == "8"


def test_weighted_vote_with_a_reward_and_with_token_probabilities() -> None:
    ranking = rank(candidates(weight=np.array([0.1, 0.2, 0.9, 5.0])), "weighted_vote")
    assert ranking.classes == ("15", "8") and ranking.posterior == pytest.approx((0.75, 0.25))
    ranking = rank(candidates(), "weighted_vote")
    w = [
        math.exp((-6 + math.log(0.6)) / 12),
        math.exp((-5 + math.log(0.5)) / 20),
        math.exp((-1 + math.log(0.7)) / 2),
    ]
    assert dict(zip(ranking.classes, ranking.posterior, strict=True)) == pytest.approx(
        {"8": (w[0] + w[1]) / sum(w), "15": w[2] / sum(w)}
    )
    with pytest.raises(UserError, match="weights >= 0, got -1"):
        rank(candidates(weight=np.array([-1.0, 0, 0, 0])), "weighted_vote")


def test_best_of_n_sum_prefers_the_short_rationale_and_mean_the_long() -> None:
    by_sum = rank(candidates(), "best_of_n")
    assert by_sum.answer == "15" and by_sum.rationales == (2, 1, 0, 3)
    assert by_sum.rationale_posterior[0] == pytest.approx(
        math.exp(-1) * 0.7 / (math.exp(-1) * 0.7 + math.exp(-5) * 0.5 + math.exp(-6) * 0.6)
    )
    by_mean = rank(candidates(), "best_of_n_mean")
    assert by_mean.answer == "8" and by_mean.rationales == (1, 0, 2, 3)


def test_mixture_averages_probabilities_and_pools_classes_after_scoring() -> None:
    ranking = rank(candidates(), "mixture")
    eight, fifteen = (0.6 + 0.2 + 0.3 + 0.5 + 0.2 + 0.1) / 4, (0.1 + 0.1 + 0.7) / 4
    assert ranking.posterior == pytest.approx((eight / (eight + fifteen), fifteen / (eight + fifteen)))
    support = np.array([0.8, 0.8, 0.3, 0.0]) / 1.9
    assert ranking.rationale_posterior == pytest.approx(support)
    assert log_marginal(candidates().logp_answer)[1] == pytest.approx(
        math.log(0.9 / 4)
    )  # the cut one counts in N


def test_mixture_converges_to_the_enumerated_marginal() -> None:
    """z in {0..4} with p(z|x), y in {0, 1, 2} with p(y|x,z): the ranker's posterior is p(y|x) as N grows."""
    generator = np.random.default_rng(0)
    p_z, p_y = generator.dirichlet(np.ones(5)), generator.dirichlet(np.ones(3), size=5)
    z = generator.choice(5, size=20_000, p=p_z)
    ranking = rank(
        Candidates(
            "p", ("a", "b", "c"), ("a", "b", "c"), tuple(np.zeros(len(z), int).tolist()), np.log(p_y[z])
        ),
        "mixture",
    )
    posterior = dict(zip(ranking.classes, ranking.posterior, strict=True))
    assert [posterior[c] for c in "abc"] == pytest.approx((p_z @ p_y).tolist(), abs=0.01)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_order_of_samples_and_of_answers_changes_nothing(method: str, data: st.DataObject) -> None:
    base = candidates()
    rows = data.draw(st.permutations(range(4)))
    columns = data.draw(st.permutations(range(3)))
    position = {old: new for new, old in enumerate(columns)}
    moved = Candidates(
        "p",
        tuple(base.answers[c] for c in columns),
        tuple(base.classes[c] for c in columns),
        tuple(position[base.chosen[r]] if base.chosen[r] >= 0 else -1 for r in rows),
        base.logp_answer[np.ix_(rows, columns)],
        base.logp_trace[rows],
        base.logp_own[rows],
        base.length[rows],
    )
    before, after = rank(base, method), rank(moved, method)
    assert after.classes == before.classes and after.posterior == pytest.approx(before.posterior)
    mapped = dict(zip((rows[n] for n in after.rationales), after.rationale_posterior, strict=True))
    assert mapped == pytest.approx(dict(zip(before.rationales, before.rationale_posterior, strict=True)))


@pytest.mark.parametrize("method", METHODS)
def test_posteriors_sum_to_one_and_ties_are_broken_by_name(method: str) -> None:
    ranking = rank(candidates(), method)
    assert sum(ranking.posterior) == pytest.approx(1) and sum(ranking.rationale_posterior) == pytest.approx(1)
    same = np.log(np.full((2, 2), 0.5))
    tied = Candidates("p", ("b", "a"), ("b", "a"), (0, 1), same, np.zeros(2), np.zeros(2), np.ones(2))
    assert rank(tied, method).classes == ("a", "b")
    assert rank(tied, method).posterior == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_readable_gives_no_answer_and_no_nan(method: str) -> None:
    nothing = candidates(classes=(None, None, None))
    ranking = rank(nothing, method)
    assert ranking.answer is None and ranking.posterior == () and ranking.abstained == 4
    assert ranking.rationale_posterior == (0.0,) * 4


@pytest.mark.parametrize("method", METHODS)
def test_rationales_that_saw_the_answer_are_refused(method: str) -> None:
    with pytest.raises(UserError, match="1 of 4 rationales were drawn behind the answer"):
        rank(candidates(saw_answer=(False, True, False, False)), method)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="unknown ranking method 'majorty'; did you mean 'majority'"):
        rank(candidates(), "majorty")
    with pytest.raises(UserError, match="mixture needs logp_answer, which problem 'p' does not have"):
        rank(candidates(logp_answer=None), "mixture")
    with pytest.raises(ValueError, match="NaN"):
        candidates(logp_trace=np.array([math.nan] * 4))
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(4, 3\)"):
        candidates(logp_answer=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="distinct: 2"):
        candidates(answers=("8", "15", "8"))


def record(k: int, answer: str | None, canonical: str | None, trace: tuple[int, ...] = (1,)) -> SampleRecord:
    return SampleRecord(
        key=str(k),
        problem_id="p",
        question="q",
        reference="8",
        prompt_ids=(0,),
        trace_ids=trace,
        trace_text="",
        trace_logps=(-0.5,) * len(trace),
        finish="length" if answer is None else "stop",
        seed=k,
        temperature=1.0,
        top_p=1.0,
        proposal="reasoner/prior",
        saw_answer=False,
        weights="w",
        engine="e",
        k=k,
        m=0 if answer is None else 1,
        answer_ids=() if answer is None else tuple(map(ord, answer)),
        answer_text=answer or "",
        answer_logps=() if answer is None else (-0.25,) * len(answer),
        canonical=canonical,
    )


RECORDS = [
    record(0, "8", "8"),
    record(1, None, None),
    record(2, "8.0", "8", (1, 2)),
    record(3, "8", "8"),
    record(4, "?", None),
]


def test_candidates_from_records() -> None:
    made = candidates_from_records(RECORDS)
    assert made.answers == ("8", "8.0", "?") and made.classes == ("8", "8", None)
    assert made.chosen == (0, -1, 1, 0, 2)
    assert made.logp_own.tolist() == [-0.25, -INF, -0.75, -0.25, -0.25]
    assert made.length.tolist() == [2, 1, 5, 2, 2]
    assert rank(made, "majority").posterior == (1.0,) and rank(made, "majority").abstained == 2
    with pytest.raises(UserError, match="several weights: v, w"):
        candidates_from_records([RECORDS[0], dataclasses.replace(RECORDS[1], weights="v")])


class Scorer:
    """log p of each target token: minus (last context id + token) / 1000. Counts what it is asked."""

    asked = 0

    def score(self, requests: list[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        self.asked += len(requests)
        return [tuple(-(sum(r.context_ids) + t) / 1000 for t in r.target_ids) for r in requests]


def test_score_matrices_score_each_distinct_rationale_once_with_the_sampled_ids() -> None:
    engine = Scorer()
    other = [dataclasses.replace(record(0, "9", "9"), problem_id="o", prompt_ids=(200,))]
    matrices = score_matrices(engine, (9,), {"p": RECORDS, "o": other}, Law())
    assert engine.asked == 2 * 3 + 1  # two distinct complete rationales ((1,) three times), three strings
    expected = np.full((5, 3), -INF)
    for n, answer in itertools.product((0, 2, 3, 4), range(3)):
        context = sum(RECORDS[n].trace_ids) + 9
        ids = [ord(c) for c in ("8", "8.0", "?")[answer]]
        expected[n, answer] = -sum(context + t for t in ids) / 1000
    assert np.allclose(matrices["p"], expected)
    assert matrices["o"].tolist() == [[-(200 + 1 + 9 + ord("9")) / 1000]]
    made = dataclasses.replace(candidates_from_records(RECORDS), logp_answer=matrices["p"])
    assert rank(made, "mixture").answer == "8"
