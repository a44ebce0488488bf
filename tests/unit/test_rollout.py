from __future__ import annotations

from collections.abc import Sequence

import pytest

from vlm_reason.engines.base import Law, SampleRequest
from vlm_reason.engines.rollout import Draw, answer_context, roll_out
from vlm_reason.engines.seeds import counter_seed
from vlm_reason.errors import UserError
from vlm_reason.types import Completion, Problem, StopRule

TRACE, ANSWER = StopRule(("T",)), StopRule(("A",), eos_is_stop=True)


class Builder:
    cue_ids = (7, 7)
    trace_stop, answer_stop = TRACE, ANSWER

    def prior_ids(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.id),)

    def hinted_ids(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.id), 99)


class Engine:
    """Every second seed gives a trace that is cut. Remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[list[SampleRequest]] = []

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        self.calls.append(list(requests))
        return [
            Completion(
                (r.seed % 1000,), (-1.0,), "", "length" if r.stop == TRACE and r.seed % 2 else "stop", r.seed
            )
            for r in requests
        ]

    def score(self, requests, progress=None):
        raise AssertionError("sampling does not score")


PROBLEMS = [Problem(str(i), "q", "a") for i in range(1, 5)]
PRIOR = (Draw(),) * 3
SIZES = {"max_trace_tokens": 8, "max_answer_tokens": 3}


def roll(problems=PROBLEMS, plan=PRIOR, engine=None, **changes):
    settings = {"run_seed": 5, "stream": "prior", "answers_per_trace": 2, **SIZES, **changes}
    return roll_out(engine or Engine(), Builder(), problems, plan, **settings)


def test_every_sample_has_the_counter_seed_of_what_it_is() -> None:
    groups = roll(policy_version=3, visit=[0, 1, 0, 2])
    for group, visit in zip(groups, [0, 1, 0, 2], strict=True):
        for k, trace in enumerate(group.traces):
            assert trace.k == k and trace.policy_version == 3
            assert trace.completion.seed == counter_seed(5, "prior", 3, group.problem.id, visit, k, 0)
            for m, answer in enumerate(trace.answers, start=1):
                assert answer.seed == counter_seed(5, "prior", 3, group.problem.id, visit, k, m)


def test_samples_do_not_depend_on_the_company_or_order_of_problems() -> None:
    together = {g.problem.id: g for g in roll()}
    assert {g.problem.id: g for g in roll(PROBLEMS[::-1])} == together
    assert roll(PROBLEMS[2:3])[0] == together["3"]
    assert roll(plan=(Draw(),) * 5)[0].traces[:3] == together["1"].traces  # more traces keep the first ones


def test_incomplete_traces_get_no_answers_and_complete_ones_get_them_all() -> None:
    traces = [trace for group in roll() for trace in group.traces]
    assert {trace.complete for trace in traces} == {True, False}
    assert all(len(trace.answers) == (2 if trace.complete else 0) for trace in traces)


def test_a_plan_draws_each_trace_by_its_own_law_but_answers_behind_the_prior_prompt() -> None:
    engine = Engine()
    plan = (Draw(), Draw("posterior/hinted", "posterior", True, 0.7, 0.9), Draw("base/prior", None))
    groups = roll(PROBLEMS, plan, engine, run_seed=6, answer_law=Law("reasoner", 0.5))
    asked = engine.calls[0]
    assert [r.law for r in asked[:3]] == [Law("reasoner"), Law("posterior", 0.7, 0.9), Law(None)]
    assert [r.prompt_ids for r in asked[3:6]] == [(2,), (2, 99), (2,)]
    assert {r.max_tokens for r in asked} == {8} and {r.stop for r in asked} == {TRACE}
    assert [t.proposal for t in groups[0].traces] == [d.name for d in plan]
    assert [t.saw_answer for t in groups[0].traces] == [False, True, False]
    complete = [(g.problem, t) for g in groups for t in g.traces if t.complete]
    assert any(t.saw_answer for _, t in complete)
    behind = [answer_context(Builder(), problem, t.ids) for problem, t in complete for _ in range(2)]
    assert [r.prompt_ids for r in engine.calls[1]] == behind
    assert {r.law for r in engine.calls[1]} == {Law("reasoner", 0.5)} and {
        r.stop for r in engine.calls[1]
    } == {ANSWER}


def test_no_answers_asked_is_one_call_and_no_problems_none() -> None:
    engine = Engine()
    assert all(not t.answers for g in roll(engine=engine, answers_per_trace=0) for t in g.traces)
    assert len(engine.calls) == 1
    assert roll([], engine=engine) == [] and len(engine.calls) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": ()}, "K.* must be >= 1"),
        ({"answers_per_trace": -1}, "answers a trace .* got -1"),
        ({"max_trace_tokens": 0}, "max_trace_tokens must be >= 1, got 0"),
        ({"problems": [PROBLEMS[0], PROBLEMS[0]]}, "'1' occurs twice"),
    ],
)
def test_bad_input_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        roll(**changes)


def test_a_problem_may_come_twice_on_different_visits() -> None:
    first, second = roll([PROBLEMS[0], PROBLEMS[0]], visit=[0, 1])
    assert first.traces[0].completion.seed != second.traces[0].completion.seed
