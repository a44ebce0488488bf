"""From a store to every metric: the published numbers of the recorded samples, and the rules of the denominator."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_reason.cli.main import main
from vlm_reason.errors import UserError
from vlm_reason.evaluation import summarise
from vlm_reason.evaluation.items import choice_probabilities, decide, items_of
from vlm_reason.evaluation.summary import Summary, summary
from vlm_reason.store import SampleRecord, SampleStore, columns_of

RECORD = SampleRecord(
    key="", problem_id="p", question="", reference="7", prompt_ids=(1,), trace_ids=(2, 3), trace_text="",
    trace_logps=(-0.5, -0.25), finish="stop", seed=0, temperature=1.0, top_p=1.0, proposal="reasoner/prior",
    saw_answer=False, weights="w", engine="e", k=0, m=1, answer_ids=(4, 5), answer_text="7",
    answer_logps=(-0.25, -0.5), answer_finish="stop", answer_seed=1, correct=True, score=1.0, parsed="7",
    failed=False, canonical="7",
)  # fmt: skip


def sample(problem: str, k: int, answer: str | None = "7", **changes: Any) -> SampleRecord:
    """A record that is right where it answers 7."""
    right = answer == "7"
    values = {"canonical": answer, "parsed": answer, "correct": right, "score": float(right), **changes}
    key = f"{problem} {k} {values.get('m', 1)} {values.get('member')} {values.get('weights')}"
    return dataclasses.replace(RECORD, key=key, problem_id=problem, k=k, **values)


def cut(problem: str, k: int, **changes: Any) -> SampleRecord:
    return sample(
        problem, k, None, m=0, finish="length", answer_ids=(), answer_logps=(), answer_finish=None, answer_text="",
        **{"correct": None, "score": None, "failed": None, **changes},
    )  # fmt: skip


def of(records: list[SampleRecord], **options: Any) -> Summary:
    return summary(columns_of(records), **options)


# ---- published numbers ----


@pytest.fixture(scope="module")
def recorded(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    folder = tmp_path_factory.mktemp("store")
    file = shared_data / "recorded_math_rm8" / "test.jsonl"
    assert main(["import", str(file), "-o", str(folder), "--quiet"]) == 0
    return summary(SampleStore.open(folder).columns(), ks=(1, 2, 3, 4, 5, 8))


GOLDEN = {
    "accuracy": "0.9100", "pass@1": "0.9100", "pass@8": "0.9600",
    "maj@1": "0.9100", "maj@3": "0.9160", "maj@5": "0.9213", "maj@8": "0.9250",
    "best_of@1": "0.9100", "best_of@2": "0.9279", "best_of@4": "0.9361", "best_of@8": "0.9400",
    "ece": "0.0500", "mce": "0.625", "ece_debiased": "0.0459", "brier": "0.0419",
    "auroc": "0.8356", "aurc": "0.02481", "e_aurc": "0.02195", "augrc": "0.01350", "prr": "0.6731",
    "semantic_entropy_auroc": "0.8295", "semantic_entropy_prr": "0.6666",
}  # fmt: skip


@pytest.mark.parametrize(("name", "printed"), GOLDEN.items())
def test_the_recorded_samples_give_the_known_numbers(recorded: Summary, name: str, printed: str) -> None:
    assert f"{recorded[name].value:.{len(printed) - 2}f}" == printed


def test_what_a_file_of_texts_cannot_say_is_skipped_by_name(recorded: Summary) -> None:
    assert set(recorded.skipped) >= {"truncated", "trace_tokens", "predictive_entropy", "mutual_information"}
    assert recorded.scored_by == "reward" and recorded.problems == 100 and recorded.samples == 800
    assert recorded["accuracy"].method == "clustered wilson"  # 8 samples of a problem are not 8 problems
    with pytest.raises(UserError, match="trace_tokens was not computed: the samples were imported without"):
        recorded["trace_tokens"]


# ---- the denominator ----


def test_cut_and_unread_samples_are_wrong_and_counted() -> None:
    records = [
        *(sample("a", k) for k in range(2)), sample("a", 2, None), cut("a", 3),
        *(sample("b", k, None) for k in range(4)),
    ]  # fmt: skip
    done = of(records)
    assert done["accuracy"].value == 2 / 8 and done["accuracy"].n == 8
    assert done["unparsed"].value == 5 / 7 and done["truncated"].value == 1 / 8
    assert done["pass@4"].value == 0.5 and done["pass^2"].value == pytest.approx((1 / 6) / 2)
    assert done["maj@4"].value == 0.5 and done["answer_accuracy"].value == 0.5
    assert done.decision is not None and done.decision.confidence.tolist() == [
        0.5,
        0.0,
    ]  # unread ones vote for none
    assert done.decision.answer.tolist() == [0, -1] and done.per_problem() == {"a": 0.5, "b": 0.0}


def test_a_verdict_of_right_on_an_unread_answer_does_not_win_the_vote() -> None:
    done = of([sample("a", 0, None, correct=True), sample("a", 1, "8")])
    assert done["answer_accuracy"].value == 0.0


def test_answers_behind_one_trace_are_one_draw() -> None:
    """The trace is worth their mean; pass@k and votes take the first."""
    records = [
        sample("a", 0, "7", m=1),
        sample("a", 0, "8", m=2),
        sample("a", 0, "8", m=3),
        sample("a", 1, "7"),
    ]
    done = of(records)
    assert done["accuracy"].value == pytest.approx((1 / 3 + 1) / 2) and done["pass@2"].n == 1
    assert done.decision is not None and done.decision.confidence.tolist() == [1.0]
    assert list(done.curve("pass@")) == [1, 2]


def test_agrees_with_the_harness_on_its_own_records() -> None:
    draw = np.random.default_rng(0)
    records = []
    for i in range(40):
        for k in range(6):
            if draw.random() < 0.1:
                records.append(cut(f"p{i}", k))
            else:
                answers = [str(7 + draw.integers(0, 3)) if draw.random() < 0.9 else None for _ in range(2)]
                records += [sample(f"p{i}", k, answer, m=m) for m, answer in enumerate(answers, start=1)]
    theirs, ours = summarise(records), of(records)
    for name, estimate in {
        "accuracy": theirs.accuracy, "unparsed": theirs.unparsed, "truncated": theirs.truncated,
        "trace_tokens": theirs.trace_length, "pass@2": theirs.pass_at[2], "pass@4": theirs.pass_at[4],
    }.items():  # fmt: skip
        assert ours[name].value == pytest.approx(estimate.value), name
        assert ours[name].ci == pytest.approx(estimate.ci), name
    assert ours.per_problem() == pytest.approx(theirs.per_problem)


def test_row_order_does_not_matter() -> None:
    draw = np.random.default_rng(1)
    records = [
        sample(f"p{i}", k, str(7 + draw.integers(0, 2)), trace_logps=(-float(draw.random()), -0.5))
        for i in range(12)
        for k in range(4)
    ]
    shuffled = [records[i] for i in draw.permutation(len(records))]
    one, other = of(records), of(shuffled)
    # order decides the first-sampled answer of a tie no more than the number k does
    assert {k: v.value for k, v in one.estimates.items() if "conformal" not in k} == pytest.approx(
        {k: v.value for k, v in other.estimates.items() if "conformal" not in k}, nan_ok=True
    )


# ---- confidence ----


def test_one_draw_has_the_likelihood_of_its_answer() -> None:
    done = of([sample("a", 0), sample("b", 0, "8"), cut("c", 0)])
    assert done.decision is not None and done.decision.kind == "likelihood"
    assert done.decision.confidence.tolist() == pytest.approx([math.exp(-0.375)] * 2 + [0.0])
    assert done["answer_accuracy"].value == pytest.approx(1 / 3)
    text = {"text_only": True, "trace_ids": (), "trace_logps": (), "answer_ids": (), "answer_logps": ()}
    bare = of([sample("a", 0, **text), sample("b", 0, "8", **text)])
    assert bare.decision is None and "no confidence" in bare.skipped["ece"]
    assert bare["accuracy"].value == 0.5 and bare.skipped["pass@k"] == "one draw a problem"


def options(logps: list[float], gold: int = 0, **changes: Any) -> dict[str, Any]:
    best = int(np.argmax(logps))
    right = best == gold
    extra = {"choice_logps": logps, "choice_gold": gold}
    return {"canonical": "ABC"[best], "correct": right, "score": float(right), "extra": extra, **changes}


def test_probabilities_of_options_with_variable_k() -> None:
    """Two members on one item of two options and one of three: closed forms."""
    a = np.log([[0.9, 0.1], [0.5, 0.5]])
    b = np.log([[0.2, 0.5, 0.3], [0.2, 0.2, 0.6]])
    records = [
        sample(name, 0, **options((row + 3.0).tolist(), member=m, weights=f"w{m}"))
        for name, rows in (("a", a), ("b", b))
        for m, row in enumerate(rows)
    ]
    done = of(records)
    p = choice_probabilities(done.items)
    assert p.tolist() == [pytest.approx([0.7, 0.3, 0.0]), pytest.approx([0.2, 0.35, 0.45])]
    assert done.decision is not None and done.decision.kind == "choices"
    assert done.decision.answer.tolist() == [0, 2] and done.decision.correct.tolist() == [True, False]
    assert done["nll_choices"].value == pytest.approx(-(math.log(0.7) + math.log(0.2)) / 2)
    multiclass = (0.3**2 + 0.3**2 + 0.8**2 + 0.35**2 + 0.45**2) / 2
    assert done["brier_multiclass"].value == pytest.approx(multiclass)
    assert done["brier"].value == pytest.approx((0.3**2 + 0.45**2) / 2)

    def entropy(*p: float) -> float:
        return -sum(q * math.log(q) for q in p if q > 0)

    total = (entropy(0.7, 0.3) + entropy(0.2, 0.35, 0.45)) / 2
    expected = (entropy(0.9, 0.1) + entropy(0.5, 0.5) + entropy(0.2, 0.5, 0.3) + entropy(0.2, 0.2, 0.6)) / 4
    assert done["total_entropy"].value == pytest.approx(total)
    assert done["expected_entropy"].value == pytest.approx(expected)
    assert done["mutual_information"].value == pytest.approx(total - expected)
    assert done.members == 2 and "classwise_ece" in done.skipped


def test_draws_of_one_item_with_different_numbers_of_options_are_refused() -> None:
    records = [sample("a", 0, **options([-1.0, -2.0])), sample("a", 1, **options([-1.0, -2.0, -3.0]))]
    with pytest.raises(UserError, match="problem 'a': its samples have different numbers of options"):
        of(records)


# ---- members of a posterior ----


def members(answers: dict[int, str], problem: str = "a") -> list[SampleRecord]:
    return [
        sample(problem, k, answer, member=m, weights=f"w{m}")
        for m, text in answers.items()
        for k, answer in enumerate(text)
    ]


def test_members_that_disagree_and_members_that_are_unsure() -> None:
    apart = of(members({0: "7777", 1: "8888"}))
    assert apart["total_entropy"].value == pytest.approx(math.log(2))
    assert apart["expected_entropy"].value == 0 and apart["mutual_information"].value == pytest.approx(
        math.log(2)
    )
    unsure = of(members({0: "7788", 1: "8787"}))
    assert unsure["expected_entropy"].value == pytest.approx(math.log(2))
    assert unsure["mutual_information"].value == 0 and unsure.members == 2


def test_a_member_without_samples_of_a_problem_is_said() -> None:
    done = of(members({0: "78", 1: "87"}) + members({0: "78"}, "b"))
    assert done.skipped["mutual_information"] == "1 pairs of problem and member have no sample"


# ---- what is no one system ----


def test_samples_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"samples of 2 models \(v, w\) are not one system"):
        of([sample("a", 0), sample("a", 1, weights="v")])
    with pytest.raises(UserError, match="are not one system"):  # two draws of a posterior under one number
        of([sample("a", 0, member=0), sample("a", 1, member=0, weights="v")])
    with pytest.raises(UserError, match="1 of 2 samples were drawn behind the answer"):
        of([sample("a", 0), sample("a", 1, saw_answer=True)])
    with pytest.raises(UserError, match="1 samples have no verdict .first: problem 'b'"):
        of([sample("a", 0), sample("b", 0, correct=None)])
    with pytest.raises(UserError, match="problem 'a' has samples at temperature 1.0 and 0.5"):
        of([sample("a", 0), sample("a", 1, temperature=0.5)])


def test_nothing_is_nan_with_a_flag_never_zero() -> None:
    done = of([])
    assert done.problems == 0 and math.isnan(done["accuracy"].value) and "empty" in done["accuracy"].flags
    assert "ece" in done.skipped and items_of(columns_of([])).ids == () and decide(done.items) is None


def test_json_holds_every_estimate() -> None:
    data = of([sample("a", k, "7" if k else "8") for k in range(3)]).to_json()
    assert data["confidence"] == "votes" and data["best_of"] == "mean log-probability"
    assert (
        data["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3) and data["skipped"]["mutual_information"]
    )
