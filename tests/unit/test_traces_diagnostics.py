"""The numbers a window reports about itself, on groups made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.unit.traces_parts import RIGHT, TEMPLATE, WRONG, group, problem
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.verifiers import Verdict
from vlm_reason.traces.diagnostics import generated_tokens, window_metrics
from vlm_reason.traces.measure import Measured
from vlm_reason.types import Coefficients, Scores

INF = float("inf")


@pytest.fixture
def prompts(tiny_tokenizer) -> PromptBuilder:
    return PromptBuilder(tiny_tokenizer, TEMPLATE)


def measured(
    log_evidence,
    *,
    logp_prior=None,
    logq=None,
    length=None,
    mask=None,
    chain=None,
    verdicts=None,
    known=True,
    right=None,
):
    e = torch.tensor(log_evidence, dtype=torch.float32)
    g, k = e.shape
    scores = Scores(
        logp_prior=torch.zeros(g, k) if logp_prior is None else torch.tensor(logp_prior),
        logq=torch.zeros(g, k) if logq is None else torch.tensor(logq),
        log_evidence=e,
        logp_answer=torch.zeros(g, k, 1),
        answer_weight=torch.ones(g, k, 1),
        length=torch.ones(g, k) if length is None else torch.tensor(length),
        mask=torch.ones(g, k, dtype=torch.bool) if mask is None else torch.tensor(mask),
        chain=None if chain is None else torch.tensor(chain),
    )
    return Measured(scores, verdicts or (((),) * k,) * g, 123, known, right)


def two_by_two(prompts):
    return [group(prompts, problem(1), [" 1+2=3", " 1+2=4"]), group(prompts, problem(2), [" a", " b"])]


def metrics(groups, m, c, alive=(True, True)):
    return window_metrics(groups, m, c, alive)


def test_the_bound_is_the_mean_log_of_mean_weights_over_groups_that_have_any(prompts):
    """Group 0: weights e pi / r = 0.5 * 2 and 0.25 * 1; group 1 has no right trace."""
    log = math.log
    m = measured(
        [[log(0.5), log(0.25)], [-INF, -INF]],
        logp_prior=[[-1.0, -3.0], [0.0, 0.0]],
        logq=[[-1.0 - log(2), -3.0], [0.0, 0.0]],
    )
    found = metrics(two_by_two(prompts), m, Coefficients(c_z=torch.ones(2, 2)))
    assert found["bound"] == pytest.approx(log((1.0 + 0.25) / 2))
    assert found["bound_null"] == 0.5


def test_the_bound_is_not_given_without_the_ratio_and_leaves_chains_out(prompts):
    log_e = [[0.0, math.log(0.5)], [0.0, math.log(0.25)]]
    c = Coefficients(c_z=torch.ones(2, 2))
    unknown = metrics(two_by_two(prompts), measured(log_e, known=False), c)
    assert unknown["bound"] is None and unknown["bound_null"] is None
    chained = metrics(two_by_two(prompts), measured(log_e, chain=[[True, False], [True, False]]), c)
    assert chained["bound"] == pytest.approx((math.log(0.5) + math.log(0.25)) / 2)


def test_ess_counts_the_weights_that_carry_a_group(prompts):
    """(sum |c|)^2 / sum c^2, over groups with weight: 2 of two equal ones, 1 of a single one."""
    groups = [*two_by_two(prompts), group(prompts, problem(3), [" c", " d"])]
    m = measured([[0.0, 0.0]] * 3)
    c_z = torch.tensor([[0.5, -0.5], [0.0, 1.0], [0.0, 0.0]])
    assert metrics(groups, m, Coefficients(c_z=c_z))["ess"] == pytest.approx(1.5)
    # with c_q alone it is the posterior's; per-token coefficients are summed over the trace
    assert metrics(groups, m, Coefficients(c_q=torch.full((3, 2), 0.25)))["ess"] == pytest.approx(2.0)
    tokens = torch.tensor([[[1.0, 0.5], [0.5, 0.0]]] * 3)  # 1.5 and 0.5 a trace
    assert metrics(groups, m, Coefficients(c_z=tokens))["ess"] == pytest.approx(4.0 / 2.5)
    assert metrics(groups, m, Coefficients(c_z=torch.zeros(3, 2)))["ess"] is None
    assert metrics(groups, m, Coefficients(c_y=torch.ones(3, 2, 1)))["ess"] is None


def test_null_rate_is_the_share_of_groups_without_rows(prompts):
    m = measured([[0.0, 0.0]] * 2)
    c = Coefficients(c_z=torch.ones(2, 2))
    assert metrics(two_by_two(prompts), m, c, [True, False])["null_rate"] == 0.5


def test_weight_length_correlation_is_pearsons_over_drawn_traces(prompts):
    groups = [group(prompts, problem(1), [" a", " b"]), group(prompts, problem(2), [" c"])]
    m = measured(
        [[0.0, 0.0], [0.0, 0.0]], length=[[2.0, 5.0], [11.0, 999.0]], mask=[[True, True], [True, False]]
    )
    c_z = torch.tensor([[0.9, 0.2], [-0.4, 0.0]])
    found = metrics(groups, m, Coefficients(c_z=c_z))["weight_length_corr"]
    assert found == pytest.approx(np.corrcoef([0.9, 0.2, 0.4], [2, 5, 11])[0, 1], abs=1e-5)
    constant = Coefficients(c_z=torch.full((2, 2), 0.5))
    assert metrics(groups, m, constant)["weight_length_corr"] is None


def test_copied_answers_are_counted_behind_a_hint_only(prompts):
    """Answer 3: derived, copied, absent. The same texts without a hint say nothing about a leak."""
    texts = [" 1+2=3", " it is 3", " 1+2=4"]
    hinted = group(prompts, problem(1), texts, proposal="posterior/hinted")
    free = group(prompts, problem(1), texts)
    m = measured([[0.0] * 3] * 2)
    c = Coefficients(c_z=torch.ones(2, 3))
    assert metrics([hinted, free], m, c)["answer_copied"] == pytest.approx(1 / 3)
    assert metrics([free, free], m, c)["answer_copied"] is None


def test_steps_are_checked_in_complete_traces_that_have_some(prompts):
    texts = [" 1+2=3", " 1+2=4", " no sums", " 1+1=2"]
    g = group(prompts, problem(1), texts, finish=["stop", "stop", "stop", "length"])
    found = metrics([g], measured([[0.0] * 4]), Coefficients(c_z=torch.ones(1, 4)), [True])
    assert found["steps_right"] == 0.5
    assert found["truncated"] == 0.25


def test_accuracies_hinted_and_not(prompts):
    free = group(prompts, problem(1), [" a", " b"])
    hinted = group(prompts, problem(1), [" c", " d"], proposal="reasoner/hinted")
    broken = Verdict(False, 0.0, None, failed=True)
    verdicts = (((RIGHT, WRONG), (WRONG, broken)), ((RIGHT,), ()))
    m = measured([[0.0, 0.0]] * 2, verdicts=verdicts, right=((0.5, 0.0), (1.0, 0.0)))
    found = metrics([free, hinted], m, Coefficients(c_z=torch.ones(2, 2)))
    assert found["accuracy"] == pytest.approx(1.5 / 4)
    assert found["unhinted_accuracy"] == pytest.approx(1 / 4)
    assert found["unverifiable"] == 1


def test_tokens_and_traces_are_counted(prompts):
    g = group(prompts, problem(1), [" ab", " ab", " abcd"], answers=[["3"], [], []])
    given = group(prompts, problem(2), [" teacher"], proposal="dataset")
    found = metrics([g], measured([[0.0] * 3]), Coefficients(c_z=torch.ones(1, 3)), [True])
    lengths = [len(prompts.trace_ids(t)) for t in ("ab", "ab", "abcd")]
    assert found["trace_tokens"] == pytest.approx(sum(lengths) / 3)
    assert found["traces"] == 3 and found["distinct_traces"] == 2
    assert found["tokens/scored"] == 123
    assert generated_tokens([g, given]) == sum(lengths) + len(prompts.answer_ids("3"))
