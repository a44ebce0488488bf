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
from vlm_reason.ranking import (
    METHODS,
    NEEDS,
    Candidates,
    candidates_from_records,
    lacking,
    outcome,
    rank,
    rank_members,
    score_candidates,
    score_matrices,
)
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
        logq=np.array([-6.5, -4.0, -1.2, -4.0]),
        trace_length=np.array([11.0, 17.0, 1.0, 30.0]),
        answer_length=np.array([1.0, 2.0, 3.0]),
        reward=np.array([0.5, -1.0, 2.0, 9.0]),
        steps=((0.9, 0.8), (0.5, 1.0, 0.7), (0.99,), (1.0, 1.0)),
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
    sigmoid = [1 / (1 + math.exp(-r)) for r in (0.5, -1.0, 2.0)]
    assert dict(zip(ranking.classes, ranking.posterior, strict=True)) == pytest.approx(
        {"8": (sigmoid[0] + sigmoid[1]) / sum(sigmoid), "15": sigmoid[2] / sum(sigmoid)}
    )
    ranking = rank(candidates(reward=None), "weighted_vote")
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
    assert ranking.mass == pytest.approx((eight + fifteen) / 1)  # the cut rationale counts in N


def test_best_of_n_by_rewards() -> None:
    """The cut rationale has the highest reward of all, and no answer."""
    by_reward = rank(candidates(), "best_of_n_reward")
    assert by_reward.answer == "15" and by_reward.rationales == (2, 0, 1, 3)
    e = [math.exp(r) for r in (0.5, -1.0, 2.0)]
    assert by_reward.posterior == pytest.approx((e[2] / (e[2] + e[0]), e[0] / (e[2] + e[0])))
    assert by_reward.rationale_posterior == pytest.approx((e[2] / sum(e), e[0] / sum(e), e[1] / sum(e), 0.0))
    assert rank(candidates(), "best_of_n_min").rationales[:3] == (2, 0, 1)  # 0.99, 0.8, 0.5
    product = rank(candidates(), "best_of_n_prod")  # 0.72, 0.35, 0.99: their softmax of logs is their share
    assert product.rationale_posterior == pytest.approx((0.99 / 2.06, 0.72 / 2.06, 0.35 / 2.06, 0.0))
    assert rank(candidates(), "best_of_n_last").rationales[:3] == (2, 0, 1)  # 0.99, 0.8, 0.7
    with pytest.raises(UserError, match=r"step scores in \[0, 1\].* has \[1.5\] for rationale 1"):
        rank(candidates(steps=((0.5,), (1.5,), (0.1,), (0.1,))), "best_of_n_min")


def test_products_of_zero_choose_no_answer() -> None:
    ranking = rank(candidates(steps=((0.0,), (0.0, 1.0), (0.0,), (0.0,))), "best_of_n_prod")
    assert ranking.classes == () and ranking.posterior == () and ranking.answer is None


def test_equal_beliefs_of_members_in_another_order_are_equal() -> None:
    """(0.2 + 0.4 + 0.6) / 3 and (0.6 + 0.4 + 0.2) / 3 differ in their last bit."""

    def votes(eights: int) -> Candidates:
        return Candidates("p", ("8", "15"), ("8", "15"), (0,) * eights + (1,) * (5 - eights))

    up = rank_members([votes(n) for n in (1, 2, 3)], "majority")
    down = rank_members([votes(n) for n in (3, 2, 1)], "majority")
    assert up.posterior == down.posterior == (0.6, 0.4) and up.classes == down.classes == ("15", "8")


def test_importance_weighs_by_p_over_q_and_reports_its_weights() -> None:
    """log w = 0.5, -1, 0.2, 0; the cut rationale holds weight and supports nothing."""
    ranking = rank(candidates(), "importance")
    w = [math.exp(v) for v in (0.5, -1.0, 0.2, 0.0)]
    eight = w[0] * 0.8 + w[1] * 0.8 + w[2] * 0.3
    fifteen = w[0] * 0.1 + w[1] * 0.1 + w[2] * 0.7
    assert ranking.classes == ("8", "15")
    assert ranking.posterior == pytest.approx((eight / (eight + fifteen), fifteen / (eight + fifteen)))
    assert ranking.mass == pytest.approx((eight + fifteen) / sum(w))
    assert ranking.ess == pytest.approx(sum(w) ** 2 / sum(v * v for v in w)) and math.isnan(ranking.pareto_k)
    support = np.array([w[0] * 0.8, w[1] * 0.8, w[2] * 0.3, 0.0]) / eight
    found = dict(zip(ranking.rationales, ranking.rationale_posterior, strict=True))
    assert [found[n] for n in range(4)] == pytest.approx(support.tolist())
    assert ranking.flags == ()
    alone = rank(candidates(logq=np.array([-16.0, -4.0, -1.2, -4.0])), "importance")
    assert alone.ess == pytest.approx(1, abs=1e-3) and alone.flags == ("low_ess",)


def test_importance_with_q_equal_to_p_is_the_mixture() -> None:
    plain = candidates(logq=candidates().logp_trace)
    a, b = rank(plain, "importance"), rank(plain, "mixture")
    assert a.posterior == pytest.approx(b.posterior) and a.se == pytest.approx(b.se)
    assert a.mass == pytest.approx(b.mass) and a.ess == pytest.approx(4)


def test_elbo_is_the_mean_log_weight_of_each_class() -> None:
    """Over the three complete rationales; p(8 | z) = 0.8, 0.8, 0.3 and p(15 | z) = 0.1, 0.1, 0.7."""
    ranking = rank(candidates(), "elbo")
    logw = (0.5 - 1.0 + 0.2) / 3
    eight = logw + (2 * math.log(0.8) + math.log(0.3)) / 3
    fifteen = logw + (2 * math.log(0.1) + math.log(0.7)) / 3
    assert ranking.posterior[0] == pytest.approx(1 / (1 + math.exp(fifteen - eight)))
    same = rank(candidates(), "importance").rationale_posterior
    assert ranking.rationale_posterior == pytest.approx(
        same
    )  # the posterior over z of one answer is the same


def test_bin_as_released_as_printed_and_as_a_mean_of_exponentials() -> None:
    p_trace, length = np.exp([-6.0, -5.0, -1.0]), np.array([11.0, 17.0, 1.0])
    p_answer = np.exp(candidates().logp_answer[:3])
    joint = p_trace[:, None] * p_answer  # [3, 3], strings 8, 15, 8.0
    tokens = length[:, None] + np.array([1.0, 2.0, 3.0])
    released = (np.log(joint) / tokens).mean(0)
    best = max(released[0], released[2])  # a class is as good as its best string
    expected = np.exp([best, released[1]]) / np.exp([best, released[1]]).sum()
    found = rank(candidates(), "bin_released")
    assert dict(zip(found.classes, found.posterior, strict=True)) == pytest.approx(
        dict(zip(("8", "15"), expected, strict=True))
    )
    for method, score in (("bin_eq9", joint / tokens), ("bin_log_mean_exp", joint ** (1 / tokens))):
        found = rank(candidates(), method)
        total = score.sum(0)
        classes = {"8": total[0] + total[2], "15": total[1]}
        assert dict(zip(found.classes, found.posterior, strict=True)) == pytest.approx(
            {name: value / total.sum() for name, value in classes.items()}
        )
        assert math.isnan(found.mass)


def test_errors_of_a_vote_are_binomial_and_of_one_draw_unknown() -> None:
    n = 10
    votes = Candidates("p", ("a", "b"), ("a", "b"), (0,) * 7 + (1,) * 3)
    ranking = rank(votes, "majority")
    assert ranking.posterior == pytest.approx((0.7, 0.3))
    assert ranking.se == pytest.approx([math.sqrt(0.7 * 0.3 / (n - 1))] * 2)
    agreed = rank(Candidates("p", ("a",), ("a",), (0, 0, 0)), "majority")
    assert agreed.se == (0.0,) and agreed.flags == ("degenerate",)
    single = rank(Candidates("p", ("a",), ("a",), (0,)), "majority")
    assert math.isnan(single.se[0]) and math.isnan(single.rationale_se[0]) and single.flags == ()


def test_answers_behind_one_rationale_are_one_draw() -> None:
    """Every candidate three times, as three answers behind its rationale: the same posteriors and errors."""
    base = candidates(weight=None, reward=None, steps=None)
    index = np.repeat(np.arange(4), 3)
    tripled = Candidates(
        "p",
        base.answers,
        base.classes,
        tuple(base.chosen[n] for n in index),
        *(a[index] for a in (base.logp_answer, base.logp_trace, base.logp_own, base.length)),
        logq=base.logq[index],
        trace_length=base.trace_length[index],
        answer_length=base.answer_length,
        draw=tuple(index.tolist()),
    )
    for method in ("majority", "mixture", "importance", "elbo", "bin_released", "bin_eq9"):
        once, thrice = rank(base, method), rank(tripled, method)
        assert thrice.posterior == pytest.approx(once.posterior) and thrice.se == pytest.approx(once.se)
        assert (thrice.mass, thrice.ess) == pytest.approx((once.mass, once.ess), nan_ok=True)
        assert sum(thrice.rationale_posterior[:3]) == pytest.approx(once.rationale_posterior[0])


def test_what_a_method_lacks() -> None:
    text_only = Candidates("p", ("a",), ("a",), (0, 0))
    assert lacking(text_only, "majority") == ()
    assert lacking(text_only, "importance") == ("logp_answer", "logp_trace", "logq")
    assert lacking(text_only, "weighted_vote") == ("logp_trace", "logp_own", "length")
    assert lacking(dataclasses.replace(text_only, reward=np.zeros(2)), "weighted_vote") == ()
    assert set(NEEDS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_needs_names_exactly_what_a_method_reads(method: str) -> None:
    every = candidates(weight=np.ones(4))
    fields = {name for one in NEEDS[method] for name in one}
    for name in ("logp_answer", "logp_trace", "logp_own", "length", "logq", "trace_length", "answer_length",
                 "weight", "reward", "steps"):  # fmt: skip
        without = dataclasses.replace(every, **{name: None})
        if name in fields and len(NEEDS[method]) == 1:
            with pytest.raises(UserError, match=f"{method} needs {name}"):
                rank(without, method)
        else:
            rank(without, method)


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
        logq=base.logq[rows],
        trace_length=base.trace_length[rows],
        answer_length=base.answer_length[columns],
        reward=base.reward[rows],
        steps=tuple(base.steps[r] for r in rows),
    )
    before, after = rank(base, method), rank(moved, method)
    assert after.classes == before.classes and after.posterior == pytest.approx(before.posterior)
    mapped = dict(zip((rows[n] for n in after.rationales), after.rationale_posterior, strict=True))
    assert mapped == pytest.approx(dict(zip(before.rationales, before.rationale_posterior, strict=True)))
    assert after.se == pytest.approx(before.se, abs=0.02 if "best_of_n" in method else 1e-12)
    assert (after.ess, after.flags) == (pytest.approx(before.ess, nan_ok=True), before.flags)


@pytest.mark.parametrize("method", METHODS)
def test_posteriors_sum_to_one_and_ties_are_broken_by_name(method: str) -> None:
    ranking = rank(candidates(), method)
    assert sum(ranking.posterior) == pytest.approx(1) and sum(ranking.rationale_posterior) == pytest.approx(1)
    same = np.log(np.full((2, 2), 0.5))
    zero, one = np.zeros(2), np.ones(2)
    more = {
        "logq": zero,
        "trace_length": one,
        "answer_length": one,
        "reward": zero,
        "steps": ((0.5,), (0.5,)),
    }
    tied = Candidates("p", ("b", "a"), ("b", "a"), (0, 1), same, zero, zero, one, **more)
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
    assert made.logq.tolist() == made.logp_trace.tolist() == [-0.5, -0.5, -1.0, -0.5, -0.5]
    assert made.trace_length.tolist() == [1, 1, 2, 1, 1] and made.answer_length.tolist() == [1, 3, 1]
    assert made.draw == (0, 1, 2, 3, 4) and made.reward is None and made.steps is None
    with pytest.raises(UserError, match="several weights: v, w"):
        candidates_from_records([RECORDS[0], dataclasses.replace(RECORDS[1], weights="v")])


def test_tempered_samples_hold_q_and_not_p_greedy_ones_p_and_not_q() -> None:
    tempered = candidates_from_records([dataclasses.replace(r, temperature=0.7) for r in RECORDS])
    assert tempered.logp_trace is None and tempered.logp_own is None and tempered.logq is not None
    nucleus = candidates_from_records([dataclasses.replace(r, top_p=0.9) for r in RECORDS])
    assert nucleus.logp_trace is None and nucleus.logq is not None
    greedy = candidates_from_records([dataclasses.replace(r, temperature=0.0) for r in RECORDS])
    assert greedy.logp_trace is not None and greedy.logq is None
    with pytest.raises(UserError, match="importance needs logq.*temperature > 0"):
        rank(dataclasses.replace(greedy, logp_answer=np.zeros((5, 3))), "importance")


def test_rewards_are_read_and_a_verdict_is_no_reward() -> None:
    """A checker compared its answer with the reference: to rank by that is to look the answer up."""
    judged = [dataclasses.replace(r, failed=False, correct=True, score=1.0) for r in RECORDS]
    assert candidates_from_records(judged).reward is None
    rewarded = [dataclasses.replace(r, reward=float(r.k)) for r in judged]
    assert candidates_from_records(rewarded).reward.tolist() == [0, 1, 2, 3, 4]
    assert candidates_from_records([*rewarded[:4], judged[4]]).reward is None
    with pytest.raises(
        UserError, match="best_of_n_reward needs reward.*a checker's verdict saw the reference"
    ):
        rank(candidates_from_records(judged), "best_of_n_reward")
    steps = [dataclasses.replace(r, extra={"step_rewards": [0.5, 0.25]}) for r in judged]
    assert candidates_from_records(steps).steps == ((0.5, 0.25),) * 5


def test_text_without_token_ids_can_be_voted_on_but_not_scored() -> None:
    texts = [
        dataclasses.replace(r, trace_ids=(), trace_logps=(), answer_ids=(), answer_logps=()) for r in RECORDS
    ]
    made = candidates_from_records(texts)
    assert rank(made, "majority").posterior == (1.0,) and made.logp_trace is None and made.length is None
    with pytest.raises(UserError, match="sample 0 of problem 'p' is stored as text, without token ids"):
        score_matrices(Scorer(), (9,), {"p": texts}, Law())


def test_outcomes_tell_selection_from_coverage() -> None:
    wrong, right = record(0, "9", "9"), dataclasses.replace(record(1, "8", "8"), correct=True)
    assert outcome([wrong, right], "8") == "right"
    assert outcome([wrong, right], "9") == outcome([wrong, right], None) == "not_chosen"
    assert outcome([wrong], "9") == outcome([wrong], None) == "never_sampled"


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


def test_score_candidates_scores_the_traces_that_were_drawn_under_another_law() -> None:
    tempered = {"p": [dataclasses.replace(r, temperature=0.5) for r in RECORDS]}
    engine = Scorer()
    made = score_candidates(engine, (9,), tempered, Law())["p"]
    assert engine.asked == 2 * 3 + 3  # and log p(z | x) of (1,), complete and cut, and of (1, 2)
    assert made.logp_trace.tolist() == pytest.approx([-0.001, -0.001, -0.003, -0.001, -0.001])
    assert made.logq.tolist() == [-0.5, -0.5, -1.0, -0.5, -0.5]
    own = [made.logp_answer[n, a] if a >= 0 else -INF for n, a in enumerate(made.chosen)]
    assert made.logp_own.tolist() == own
    ranking = rank(made, "importance")
    logw = made.logp_trace - made.logq
    assert ranking.ess == pytest.approx(np.exp(logw).sum() ** 2 / np.exp(2 * logw).sum())
    untouched = score_candidates(Scorer(), (9,), {"p": RECORDS}, Law())["p"]
    assert untouched.logp_trace.tolist() == [-0.5, -0.5, -1.0, -0.5, -0.5]  # kept from sampling
