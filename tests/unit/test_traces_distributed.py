"""Dealing a window and a step to processes, as pure functions; the shares of a window put together again."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.traces_parts import TEMPLATE, answer, completion, problem
from vlm_reason.errors import UserError
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.verifiers import Verdict
from vlm_reason.traces.distributed import Ranks, deal_groups, in_lockstep
from vlm_reason.traces.measure import Measured
from vlm_reason.traces.rows import Row
from vlm_reason.traces.shares import Share, merged
from vlm_reason.traces.step import Batch
from vlm_reason.types import Scores, Trace, TraceGroup


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_problem_is_sampled_once(n, size):
    shares = [Ranks(rank, size).share(n) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers(0, 500), max_size=30), st.integers(1, 8))
def test_groups_are_dealt_whole_and_about_evenly(tokens, ranks):
    dealt = deal_groups(tokens, ranks)
    assert sorted(g for own in dealt for g in own) == list(range(len(tokens)))
    heaviest = max(sum(tokens[g] for g in own) for own in dealt)
    # Graham's bound on the longest-first rule, against a lower bound of the best makespan
    best = max(
        max(tokens, default=0),
        sum(tokens) / ranks,
        sum(sorted(tokens)[-ranks - 1 :][:2]) if len(tokens) > ranks else 0,
    )
    assert heaviest <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9
    assert dealt == deal_groups(tokens, ranks)


def test_one_process_trains_on_everything_in_order():
    assert deal_groups([3, 9, 1], 1) == [[0, 1, 2]]


def batch(adapter: str, tokens: int) -> Batch:
    return Batch(adapter, [Row(adapter, (1,), (2,) * tokens, (1.0,) * tokens)], tokens)


def test_in_lockstep_all_ranks_run_the_same_adapters_equally_often():
    cut = [
        [batch("reasoner", 5), batch("reasoner", 4), batch("posterior", 7)],
        [batch("reasoner", 6)],
        [],
    ]
    runs = [in_lockstep(cut, rank) for rank in range(3)]
    assert {tuple(b.adapter for b in run) for run in runs} == {("reasoner", "reasoner", "posterior")}
    assert [[(b.tokens, b.counts) for b in run] for run in runs] == [
        [(5, True), (4, True), (7, True)],
        [(6, True), (4, False), (7, False)],
        [(4, False), (4, False), (7, False)],
    ]
    assert [b for run in runs for b in run if b.counts] == [b for own in cut for b in own]


def test_alone_work_is_done_here_and_its_errors_are_its_own():
    assert Ranks().together(lambda: 3) == [3]
    with pytest.raises(KeyError):
        Ranks().together(lambda: {}["x"])
    Ranks().agree("anything", "this")
    Ranks().wait()


# ---- shares ------------------------------------------------------------------------------------------------------


def measured(groups: int, width: int, answers: int, first: float, right: bool = True) -> Measured:
    """Scores whose numbers say whose they are; `width` traces each."""
    values = {}
    for i, field in enumerate(fields(Scores)):
        shape = {"logp_answer": (groups, width, answers), "answer_weight": (groups, width, answers)}.get(
            field.name, (groups,) if field.name in ("problem", "logp_empty") else (groups, width)
        )
        values[field.name] = torch.full(shape, first + i / 100)
    values["mask"] = torch.ones(groups, width, dtype=torch.bool)
    values["chain"] = torch.zeros(groups, width, dtype=torch.bool)
    verdict = Verdict(True, first, "")
    return Measured(
        Scores(**values),
        tuple(tuple((verdict,) * answers for _ in range(width)) for _ in range(groups)),
        10,
        True,
        tuple((first,) * width for _ in range(groups)) if right else None,
    )


def group(prompts: PromptBuilder, i: int, width: int) -> TraceGroup:
    about = problem(i)
    traces = tuple(
        Trace(about.id, k, "reasoner/prior", (1,), completion(prompts, "1"), answers=(answer(prompts, "1"),))
        for k in range(width)
    )
    return TraceGroup(about, traces)


@pytest.fixture
def prompts(tiny_tokenizer) -> PromptBuilder:
    return PromptBuilder(tiny_tokenizer, TEMPLATE)


def test_shares_come_together_in_the_order_of_the_window(prompts):
    """Rank 0 has problems 0 and 2 with two traces each, rank 1 has problem 1 with three, rank 2 has nothing."""
    shares = [
        Share((0, 2), (group(prompts, 0, 2), group(prompts, 2, 2)), measured(2, 2, 1, 1.0), 5),
        Share((1,), (group(prompts, 1, 3),), measured(1, 3, 1, 2.0), 7),
        Share((), (), None),
    ]
    groups, out, discarded = merged(shares)
    assert [g.problem.id for g in groups] == ["p0", "p1", "p2"] and discarded == 12
    assert out.scores.mask.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert out.scores.log_evidence[0, 2] == -torch.inf and out.scores.logp_answer[2, 2, 0] == -torch.inf
    assert out.scores.logp_prior.tolist() == [[1, 1, 0], [2, 2, 2], [1, 1, 0]]
    assert out.scored_tokens == 20 and out.right == ((1.0, 1.0), (2.0, 2.0, 2.0), (1.0, 1.0))
    assert [len(v) for v in out.verdicts] == [2, 3, 2]


def test_one_share_is_the_window_itself(prompts):
    share = Share((0, 1), (group(prompts, 0, 2), group(prompts, 1, 2)), measured(2, 2, 1, 1.0))
    groups, out, _ = merged([share])
    assert tuple(groups) == share.groups
    for field in fields(Scores):
        assert torch.equal(getattr(out.scores, field.name), getattr(share.measured.scores, field.name))


def test_the_ratio_is_known_only_where_every_share_knows_it(prompts):
    known = measured(1, 1, 1, 1.0)
    unknown = replace(measured(1, 1, 1, 1.0), ratio_known=False)
    shares = [Share((0,), (group(prompts, 0, 1),), known), Share((1,), (group(prompts, 1, 1),), unknown)]
    assert merged(shares)[1].ratio_known is False


def test_a_share_without_answers_is_wrong_where_another_has_some(prompts):
    """As in one process: its traces were all cut off, so nothing was sampled behind them."""
    sampled = measured(1, 2, 1, 0.5)
    silent = replace(measured(1, 2, 1, 0.7), verdicts=(((), ()),), right=((0.7, 0.7),))
    shares = [
        Share((0,), (group(prompts, 0, 2),), sampled),
        Share((1,), (group(prompts, 1, 2),), silent),
    ]
    assert merged(shares)[1].right == ((0.5, 0.5), (0.0, 0.0))


def test_a_share_fails_as_a_user_error_in_one_process():
    def wrong() -> None:
        raise UserError("no trace to learn from")

    with pytest.raises(UserError, match="no trace"):
        Ranks().together(wrong)
