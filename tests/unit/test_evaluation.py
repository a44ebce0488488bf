from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from vlm_reason.engines.base import SampleRequest, ScoreRequest
from vlm_reason.errors import UserError
from vlm_reason.evaluation import (
    BoundConfig,
    EvalConfig,
    answer_kind,
    bound,
    compare,
    draw,
    evaluate,
    make_judge,
    sample_into,
    stored,
    summarise,
)
from vlm_reason.evaluation.metrics import accuracy, pass_at_k, pass_at_k_of_item, pass_hat_k_of_item
from vlm_reason.store import Provenance, SampleStore
from vlm_reason.types import Completion, Problem, StopRule

# A world of two letters: z is 10 or 11 (closed by 2) or never closes; y is "7" (id 57) or "8" (id 58).
P_Z = {"good": 0.5, "bad": 0.3, "cut": 0.2}
P_SEVEN = {"good": 0.9, "bad": 0.2, "empty": 0.4}
TRACES = {"good": (10, 2), "bad": (11, 2), "cut": (12, 12, 12)}
NAMES = {ids: name for name, ids in TRACES.items()} | {(2,): "empty"}
P_REFERENCE = P_Z["good"] * P_SEVEN["good"] + P_Z["bad"] * P_SEVEN["bad"]


class Builder:
    cue_ids = (3,)
    trace_stop = StopRule(("T",))
    answer_stop = StopRule(("A",), eos_is_stop=True)

    def prior_ids(self, problem: Problem) -> tuple[int, ...]:
        return (1,)

    def hinted_ids(self, problem: Problem) -> tuple[int, ...]:
        raise AssertionError("an evaluation never shows the answer")

    def direct_ids(self, problem: Problem) -> tuple[int, ...]:
        return (1, 2, 3)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        return (50 + int(text),)

    def parse_answer(self, text: str) -> str | None:
        return None if text == "?" else text


class World:
    def __init__(self, skill: float = 1.0) -> None:
        self.skill = skill

    def p_seven(self, context: tuple[int, ...]) -> float:
        return P_SEVEN[NAMES[context[1:-1]]] * self.skill

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        return [self._one(r, random.Random(r.seed).random()) for r in requests]

    def _one(self, request: SampleRequest, u: float) -> Completion:
        if request.stop == Builder.trace_stop:
            name = "good" if u < 0.5 else "bad" if u < 0.8 else "cut"
            ids = TRACES[name]
            return Completion(
                ids, (-1.0,) * len(ids), name, "length" if name == "cut" else "stop", request.seed
            )
        text = "7" if u < self.p_seven(request.prompt_ids) else "?" if u > 0.95 else "8"
        return Completion((50,), (-1.0,), text, "stop", request.seed)

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        return [
            (math.log(p if r.target_ids == (57,) else 1 - p),)
            for r in requests
            for p in [self.p_seven(r.context_ids)]
        ]


class Verifier:
    def verify(self, problem: Problem, answer_text: str) -> SimpleNamespace:
        right = answer_text == problem.answer
        return SimpleNamespace(correct=right, score=float(right), parsed=answer_text or None, failed=False)


PROBLEMS = [Problem(f"p{i}", "3 + 4?", "7") for i in range(300)]
JUDGE = make_judge(Verifier(), Builder())


def test_accuracy_of_samples_is_the_enumerated_one() -> None:
    result = evaluate(World(), Builder(), PROBLEMS, JUDGE, EvalConfig(traces=8, answers=2, temperature=1.0))
    low, high = result.accuracy.ci
    assert low <= P_REFERENCE <= high and high - low < 0.06 and result.accuracy.method == "clustered wilson"
    assert result.accuracy.value == pytest.approx(P_REFERENCE, abs=0.03)
    assert result.truncated.value == pytest.approx(P_Z["cut"], abs=0.03)
    assert result.trace_length.value == pytest.approx(2 * 0.8 + 3 * 0.2, abs=0.05)
    assert result.pass_at[8].value == pytest.approx(1 - (1 - P_REFERENCE) ** 8, abs=0.03)
    assert list(result.pass_at) == [2, 4, 8] and result.problems == 300
    assert result.tokens_per_second > 0


def test_one_sample_a_problem_has_the_wilson_interval() -> None:
    result = evaluate(World(), Builder(), PROBLEMS, JUDGE)
    assert result.accuracy.method == "wilson" and result.accuracy.n == 300 and not result.pass_at
    assert set(result.per_problem.values()) == {0.0, 1.0}


def test_cut_and_unparsed_samples_stay_in_the_denominator() -> None:
    records = draw(World(), Builder(), PROBLEMS[:40], JUDGE, EvalConfig(), Provenance("w", "e", 0.0))
    result = summarise(records)
    right = sum(bool(r.correct) for r in records)
    cut = sum(not r.complete for r in records)
    unread = [r for r in records if r.answer_text == "?"]
    assert cut and unread and result.accuracy.value == right / 40
    assert result.truncated.value == cut / 40 and result.unparsed.value == len(unread) / (40 - cut)
    assert all(r.canonical is None and r.parsed is None for r in unread)
    assert {r.canonical for r in records if r.answer_text == "7"} == {"7"}
    assert result.tokens == sum(len(r.trace_ids) + len(r.answer_ids) for r in records)


def test_a_cut_trace_weighs_as_much_as_one_with_many_answers() -> None:
    config = EvalConfig(traces=2, answers=4, temperature=1.0)
    records = draw(World(), Builder(), PROBLEMS[:50], JUDGE, config, Provenance("w", "e", 1.0))
    by_trace: dict[tuple[str, int], list[bool]] = {}
    for r in records:
        by_trace.setdefault((r.problem_id, r.k), []).append(bool(r.correct))
    expected = sum(sum(v) / 4 for v in by_trace.values()) / 100
    assert len(by_trace) == 100 and summarise(records).accuracy.value == pytest.approx(expected)


def test_an_answer_cut_at_its_cap_is_wrong_whatever_it_says() -> None:
    answer = Completion((57,), (-1.0,), "7", "length", 0)
    verdict, canonical = JUDGE(PROBLEMS[0], answer)
    assert not verdict.correct and verdict.parsed is None and canonical is None
    assert JUDGE(PROBLEMS[0], dataclasses.replace(answer, finish="stop"))[0].correct


def test_the_same_result_comes_from_a_store(tmp_path) -> None:
    records = draw(World(), Builder(), PROBLEMS[:20], JUDGE, EvalConfig(), Provenance("w", "e", 0.0))
    with SampleStore(tmp_path) as store:
        store.append(records)
    assert summarise(list(SampleStore.open(tmp_path).records())) == summarise(records)


def test_comparison_is_paired_on_common_random_numbers() -> None:
    base, better = (evaluate(World(s), Builder(), PROBLEMS, JUDGE) for s in (0.5, 1.0))
    estimate = compare(better, base)
    assert estimate.value == pytest.approx(better.accuracy.value - base.accuracy.value)
    assert estimate.losses == 0 and estimate.ci[0] > 0 and estimate.p < 1e-6
    unpaired = math.hypot(better.accuracy.se, base.accuracy.se)
    assert estimate.se < 0.8 * unpaired  # same seeds: the problems both get right cancel
    with pytest.raises(UserError, match="not run on the same items"):
        compare(better, evaluate(World(), Builder(), PROBLEMS[:10], JUDGE))


def test_records_of_two_models_or_without_verdicts_are_refused() -> None:
    a, b = (
        draw(World(), Builder(), PROBLEMS[:5], JUDGE, EvalConfig(), Provenance(w, "e", 0.0)) for w in "ab"
    )
    with pytest.raises(UserError, match="records of 2 models"):
        summarise([*a, *b])
    with pytest.raises(UserError, match="without a verdict"):
        summarise(draw(World(), Builder(), PROBLEMS[:5], None, EvalConfig(), Provenance("w", "e", 0.0)))
    assert summarise([]).accuracy.flags == ("empty",)


def test_greedy_is_drawn_once() -> None:
    with pytest.raises(UserError, match=r"greedy decoding .* traces=4"):
        EvalConfig(traces=4)
    with pytest.raises(UserError, match="answers must be >= 1, got 0"):
        EvalConfig(answers=0)


def exact_iwae(k: int) -> float:
    """E log (1/K) sum w over all K-tuples of {good, bad, cut}, over the tuples that are not all cut."""
    total, mass = 0.0, 0.0
    for names in itertools.product(P_Z, repeat=k):
        weight = sum(P_SEVEN[n] for n in names if n != "cut")
        if weight > 0:
            p = math.prod(P_Z[n] for n in names)
            total, mass = total + p * math.log(weight / k), mass + p
    return total / mass


@pytest.mark.parametrize("k", [2, 4])
def test_bound_is_the_enumerated_one(k: int) -> None:
    result = bound(
        World(), Builder(), [Problem(f"p{i}", "q", "7") for i in range(2000)], BoundConfig(traces=k)
    )
    assert result.iwae.value == pytest.approx(exact_iwae(k), abs=4 * result.iwae.se)
    assert result.iwae.n_dropped == pytest.approx(2000 * 0.2**k, abs=5 * math.sqrt(2000 * 0.2**k))
    assert "infinite" in result.iwae.flags
    assert result.probability.value == pytest.approx(P_REFERENCE, abs=4 * result.probability.se)
    assert result.probability.n == 2000
    assert result.truncated == pytest.approx(0.2, abs=0.03)
    traced = (0.5 * math.log(0.9) + 0.3 * math.log(0.2)) / 0.8
    assert result.logp_traced.value == pytest.approx(traced, abs=4 * result.logp_traced.se)
    assert result.logp_empty.value == pytest.approx(math.log(0.4)) and result.traces == k


def test_bound_rises_with_k_below_log_p_and_repeats_exactly() -> None:
    problems = [Problem(f"p{i}", "q", "7") for i in range(500)]
    four, sixteen = (bound(World(), Builder(), problems, BoundConfig(traces=k)) for k in (4, 16))
    assert four.iwae.value < sixteen.iwae.value < math.log(P_REFERENCE)
    assert bound(World(), Builder(), problems, BoundConfig(traces=4)).iwae == four.iwae
    turned = bound(World(), Builder(), problems[::-1], BoundConfig(traces=4))
    assert turned.per_problem == four.per_problem
    assert bound(World(), Builder(), [], BoundConfig()).iwae.flags == ("empty",)


def test_pass_at_k_is_the_average_over_subsets() -> None:
    for n, c in [(5, 0), (5, 2), (6, 5), (4, 4)]:
        draws = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(draws, k))
            assert pass_at_k_of_item(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
            assert pass_hat_k_of_item(n, c, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))
    assert math.isnan(pass_at_k_of_item(4, 4, 5)) and math.isnan(pass_hat_k_of_item(4, 4, 5))
    estimate = pass_at_k([1, 4, 2], [4, 4, 2], 3)
    assert estimate.value == pytest.approx((0.75 + 1) / 2) and estimate.n_dropped == 1
    for bad in [(3, 4, 1), (3, 1, 0)]:
        with pytest.raises(ValueError):
            pass_at_k_of_item(*bad)


def test_accuracy_chooses_its_interval() -> None:
    assert accuracy([1, 0, 1], ["a", "b", "c"]).method == "wilson"
    assert accuracy([1, 0, 1], ["a", "b", "b"]).method == "clustered wilson"
    assert accuracy([0.5, 0, 1], ["a", "b", "c"]).method == "clustered wilson"


def test_answer_kind_is_read_off_the_problem() -> None:
    assert answer_kind(Problem("a", "q", "B", metadata={"choices": ("x", "y")})) == "choice"
    assert answer_kind(Problem("a", "q", "1,024")) == "number"
    assert answer_kind(Problem("a", "q", "Yes")) == "yes_no"
    assert answer_kind(Problem("a", "q", "Paris")) == "text"


def test_a_store_is_filled_once_and_an_interrupted_fill_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vlm_reason.evaluation.sampling.SAMPLES_PER_CHUNK", 40)
    config = EvalConfig(traces=4, answers=2, temperature=1.0)
    provenance = Provenance("w", "e", 1.0)

    class Stops(World):
        calls = 0

        def sample(self, requests, progress=None):
            self.calls += 1
            if self.calls == 4:  # the second chunk's answers
                raise KeyboardInterrupt
            return super().sample(requests, progress)

    def fill(world: World, problems: int, config: EvalConfig = config) -> int:
        with SampleStore(tmp_path) as store:
            return sample_into(store, world, Builder(), PROBLEMS[:problems], JUDGE, config, provenance)

    with pytest.raises(KeyboardInterrupt):
        fill(Stops(), 20)
    kept = len(SampleStore(tmp_path))
    assert {r.problem_id for r in SampleStore(tmp_path).records()} == {f"p{i}" for i in range(5)}
    expected = draw(World(), Builder(), PROBLEMS[:20], JUDGE, config, provenance)
    assert fill(World(), 20) == len(expected) - kept
    assert sorted(r.key for r in SampleStore(tmp_path).records()) == sorted(r.key for r in expected)
    assert fill(World(), 20) == 0
    with SampleStore(tmp_path) as store:
        store.append(draw(World(), Builder(), PROBLEMS[:20], JUDGE, config, Provenance("other", "e", 1.0)))
        mine = stored(store, Builder(), PROBLEMS[:20], config, provenance)
    assert {r.key for r in mine} == {r.key for r in expected}
    more = dataclasses.replace(config, traces=6)
    longer = draw(World(), Builder(), PROBLEMS[:20], JUDGE, more, provenance)
    assert fill(World(), 20, more) == len(longer) - len(expected)  # the first four traces stay
