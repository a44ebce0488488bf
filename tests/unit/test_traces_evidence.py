"""Every evidence against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.unit.traces_parts import RIGHT, TEMPLATE, WRONG, group, problem
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.verifiers import Verdict
from vlm_reason.traces import evidence

INF = float("inf")


def test_accuracy_is_the_share_of_right_answers_in_log():
    half = Verdict(False, 0.5, "1")  # a verifier that grades
    verdicts = [[(RIGHT, WRONG, WRONG, WRONG), (RIGHT, half)], [(WRONG, WRONG), ()]]
    log_e = evidence.accuracy(verdicts, width=3)
    assert log_e.exp().tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]
    assert log_e[1].tolist() == [-INF, -INF, -INF]  # none right; incomplete; never drawn


TOKENS = [[(math.log(0.5), math.log(0.25), math.log(0.8)), ()]]
"""One trace whose reference answer has tokens of probability 1/2, 1/4 and 4/5, and one incomplete trace."""


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (evidence.answer_logp, 0.5 * 0.25 * 0.8),
        (evidence.answer_mean_logp, (0.5 * 0.25 * 0.8) ** (1 / 3)),
        (evidence.answer_mean_p, (0.5 + 0.25 + 0.8) / 3),
    ],
)
def test_likelihoods_of_the_reference_answer(function, value):
    log_e = function(TOKENS, width=2)
    assert log_e.exp()[0].tolist() == pytest.approx([value, 0.0])
    assert float(log_e[0, 1]) == -INF


def test_minus_no_trace_is_the_gain_over_no_trace_and_never_negative():
    with_trace = torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.2, 0.3]]).log()
    gain = evidence.minus_no_trace(with_trace, torch.tensor([0.5, 0.2]).log())
    assert gain.exp().flatten().tolist() == pytest.approx([0.1, 0.0, 0.0, 0.7, 0.0, 0.1], abs=1e-6)


def test_perplexity_ranks_run_from_one_down_to_one_over_k():
    mean_logp = torch.tensor([[-3.0, -0.5, -2.0, -1.0]])
    score = evidence.perplexity_rank(mean_logp, torch.ones(1, 4)).exp()
    assert score[0].tolist() == pytest.approx([0.25, 1.0, 0.5, 0.75])


def test_tied_perplexities_share_the_mean_of_their_ranks():
    mean_logp = torch.tensor([[-1.0, -2.0, -2.0, -3.0], [-1.0, -1.0, -1.0, -1.0]])
    score = evidence.perplexity_rank(mean_logp, torch.ones(2, 4)).exp()
    assert score[0].tolist() == pytest.approx([1.0, 0.625, 0.625, 0.25])
    assert score[1].tolist() == pytest.approx([0.625] * 4)
    assert score.sum(1).tolist() == pytest.approx([2.5, 2.5])  # 1 + 3/4 + 1/2 + 1/4, whatever the ties


def test_an_incomplete_trace_ranks_last_with_score_zero():
    score = evidence.perplexity_rank(torch.tensor([[-1.0, -INF, -2.0, -INF]]), torch.ones(1, 4)).exp()
    assert score[0].tolist() == pytest.approx([1.0, 0.0, 0.75, 0.0])


def test_longer_traces_are_discounted_by_one_plus_log10_of_their_length():
    """Cost 3 at 100 tokens is 3 / (1 + 2) = 1, below cost 1.5 at one token; below 1 token nothing is divided."""
    score = evidence.perplexity_rank(torch.tensor([[-1.5, -3.0, -1.2]]), torch.tensor([[1.0, 100.0, 0.0]]))
    assert score[0].exp().tolist() == pytest.approx([1 / 3, 1.0, 2 / 3])


def test_given_traces_have_evidence_one_when_they_are_complete(tiny_tokenizer):
    prompts = PromptBuilder(tiny_tokenizer, TEMPLATE)
    groups = [
        group(prompts, problem(1), [" a", " b"], finish=["stop", "length"]),
        group(prompts, problem(2), [" c"], finish=["eos"]),
    ]
    assert evidence.complete(groups, width=2).tolist() == [[0.0, -INF], [-INF, -INF]]
