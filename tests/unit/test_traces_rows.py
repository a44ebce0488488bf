"""Training rows and what they add to the objective, against plain forward passes and hand formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unit.traces_parts import TEMPLATE, group, problem
from vlm_reason.errors import UserError
from vlm_reason.scoring.logprobs import score_sequences
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.traces import Evidence, Phase
from vlm_reason.traces.rows import Row, dataset_rows, group_rows, rows_objective, sampler_logps
from vlm_reason.types import Coefficients


def phase(targets="gold", trains=("reasoner",), **values) -> Phase:
    return Phase(
        "test", lambda s, state: (Coefficients(), state), trains=trains, targets=targets,
        evidence=Evidence("one"), **values,
    )  # fmt: skip


@pytest.fixture
def prompts(tiny_tokenizer) -> PromptBuilder:
    return PromptBuilder(tiny_tokenizer, TEMPLATE)


def objective(rows: list[Row], model, which: Phase) -> Tensor:
    logps, _ = score_sequences(model, [(row.context, row.target) for row in rows])
    return rows_objective(rows, logps, which)


def logp(model, context, target) -> float:
    """sum_t log p(target_t | ...) by one plain forward pass."""
    ids = torch.tensor([[*context, *target]])
    with torch.no_grad():
        law = model(ids).logits.float().log_softmax(-1)[0, :-1]
    return float(law.gather(1, ids[0, 1:, None])[len(context) - 1 :, 0].sum())


def test_a_row_of_trace_and_answer_equals_the_two_apart(tiny_llama, prompts):
    g = group(prompts, problem(3), [" 3+4", " so 7"])
    c_z, c_y = torch.tensor([[0.7, -0.2]]), torch.tensor([[[-0.3], [0.5]]])
    rows = group_rows(0, g, phase(), Coefficients(c_z=c_z, c_y=c_y), prompts)
    assert len(rows) == 2  # one forward a trace
    x, y = prompts.prior_ids(g.problem), prompts.answer_ids("7")
    expected = 0.0
    for k, trace in enumerate(g.traces):
        expected += float(c_z[0, k]) * logp(tiny_llama, x, trace.ids)
        expected += float(c_y[0, k, 0]) * logp(tiny_llama, (*x, *trace.ids, *prompts.cue_ids), y)
    assert objective(rows, tiny_llama, phase()).item() == pytest.approx(expected, rel=1e-5)


def test_joining_does_not_change_the_gradient(tiny_llama, prompts):
    g = group(prompts, problem(3), [" 3+4"])
    x, y, z = prompts.prior_ids(g.problem), prompts.answer_ids("7"), g.traces[0].ids
    joined = group_rows(
        0, g, phase(), Coefficients(c_z=torch.tensor([[0.7]]), c_y=torch.tensor([[[-0.3]]])), prompts
    )
    apart = [
        Row("reasoner", x, z, (0.7,) * len(z)),
        Row("reasoner", (*x, *z, *prompts.cue_ids), y, (-0.3,) * len(y)),
    ]
    weight = tiny_llama.model.layers[0].self_attn.q_proj.weight
    gradients = [
        torch.autograd.grad(objective(rows, tiny_llama, phase()), weight)[0] for rows in (joined, apart)
    ]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_each_token_takes_its_own_coefficient(prompts):
    g = group(prompts, problem(3), [" 12"])  # three tokens and the end
    c_z = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 9.0, 9.0]]])  # wider than the trace: the rest is not read
    (row,) = group_rows(0, g, phase("none"), Coefficients(c_z=c_z), prompts)
    assert row.weight == pytest.approx([0.1, 0.2, 0.3, 0.4])
    logps = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
    value = rows_objective([row], logps, phase("none"))
    assert value.item() == pytest.approx(-(0.1 + 0.4 + 0.9 + 1.6))
    assert torch.autograd.grad(value, logps)[0][0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_every_sampled_answer_counts_with_its_own_coefficient(tiny_llama, prompts):
    g = group(prompts, problem(3), [" 3+4"], answers=[["7", "8", "6"]])
    c_z, c_y = torch.tensor([[0.5]]), torch.tensor([[[0.0, 0.25, -0.75]]])
    rows = group_rows(0, g, phase("sampled"), Coefficients(c_z=c_z, c_y=c_y), prompts)
    assert len(rows) == 2  # the answer without weight has no row, the first with weight shares the trace's
    x, z = prompts.prior_ids(g.problem), g.traces[0].ids
    behind = (*x, *z, *prompts.cue_ids)
    expected = 0.5 * logp(tiny_llama, x, z)
    expected += 0.25 * logp(tiny_llama, behind, prompts.answer_ids("8"))
    expected -= 0.75 * logp(tiny_llama, behind, prompts.answer_ids("6"))
    assert objective(rows, tiny_llama, phase("sampled")).item() == pytest.approx(expected, rel=1e-5)


def test_the_cue_is_never_trained(prompts):
    g = group(prompts, problem(3), [" 3+4"])
    (row,) = group_rows(
        0, g, phase(), Coefficients(c_z=torch.tensor([[1.0]]), c_y=torch.tensor([[[2.0]]])), prompts
    )
    z, y = g.traces[0].ids, prompts.answer_ids("7")
    assert row.target == (*z, *prompts.cue_ids, *y)
    assert row.weight == (1.0,) * len(z) + (0.0,) * len(prompts.cue_ids) + (2.0,) * len(y)
    assert row.useful == len(z) + len(y)
    assert row.tokens == len(row.context) + len(row.target)


def test_the_posterior_is_trained_behind_the_hint_and_only_when_the_phase_trains_it(prompts):
    g = group(prompts, problem(3), [" 3+4", " 7"])
    c = Coefficients(c_z=torch.tensor([[1.0, 0.0]]), c_q=torch.tensor([[0.25, 0.75]]))
    both = group_rows(0, g, phase("none", ("reasoner", "posterior")), c, prompts)
    assert [(r.adapter, r.context, r.weight[0]) for r in both] == [
        ("reasoner", prompts.prior_ids(g.problem), 1.0),
        ("posterior", prompts.hinted_ids(g.problem), 0.25),
        ("posterior", prompts.hinted_ids(g.problem), 0.75),
    ]
    assert [r.adapter for r in group_rows(0, g, phase("none"), c, prompts)] == ["reasoner"]
    assert [r.adapter for r in group_rows(0, g, phase("none", ("posterior",)), c, prompts)] == [
        "posterior"
    ] * 2


def test_a_group_without_weight_has_no_rows(prompts):
    g = group(prompts, problem(3), [" 3+4", " 7"])
    zero = Coefficients(c_z=torch.zeros(1, 2), c_y=torch.zeros(1, 2, 1))
    assert group_rows(0, g, phase(), zero, prompts) == []


def test_equal_rows_are_merged_where_the_objective_is_linear(prompts):
    """The trace drawn twice is forwarded once with the sum of its weights; weights that cancel leave nothing."""
    g = group(prompts, problem(3), [" 3+4", " 7", " 3+4"])
    c = Coefficients(c_z=torch.tensor([[0.5, 1.0, 0.25]]))
    assert [r.weight[0] for r in group_rows(0, g, phase("none"), c, prompts)] == [0.75, 1.0]
    for nonlinear in (phase("none", clip=0.2), phase("none", kl=0.1)):
        assert [r.weight[0] for r in group_rows(0, g, nonlinear, c, prompts)] == [0.5, 1.0, 0.25]
    cancels = Coefficients(c_z=torch.tensor([[0.5, 0.0, -0.5]]))
    assert group_rows(0, g, phase("none"), cancels, prompts) == []


# ---- the objective of a row ------------------------------------------------------------------------------------


def rows_of(weight, old=None, ref=None) -> Row:
    return Row("reasoner", (1,), tuple(range(len(weight))), tuple(weight), old, ref)


@pytest.mark.parametrize("weight", [1.5, -1.5])
@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.1, 0.5])
def test_the_clip_is_ppos(weight, shift):
    """min(w rho, w clip(rho)): pushed further only while rho has not left [1 - c, 1 + c] in the weight's direction."""
    old = -1.0
    logps = torch.tensor([[old + shift]], requires_grad=True)
    value = rows_objective([rows_of([weight], (old,))], logps, phase(clip=0.2))
    rho = math.exp(shift)
    assert value.item() == pytest.approx(min(weight * rho, weight * min(max(rho, 0.8), 1.2)))
    stopped = rho > 1.2 if weight > 0 else rho < 0.8
    (gradient,) = torch.autograd.grad(value, logps)
    assert gradient.item() == pytest.approx(0.0 if stopped else weight * rho)


def test_at_the_old_weights_the_clip_changes_no_gradient():
    row = rows_of([0.5, -2.0, 1.0], (-1.0, -2.0, -3.0))
    logps = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(rows_objective([row], logps, phase(clip=0.2)), logps)
    assert gradient[0].tolist() == pytest.approx([0.5, -2.0, 1.0])


def test_the_kl_term_is_k3_on_trained_tokens_only():
    """k3 = exp(d) - d - 1, d = ref - logp (Schulman 2020); its gradient in logp is 1 - exp(d)."""
    row = rows_of([1.0, 0.0, -1.0], None, (-1.5, -9.0, -2.0))
    logps = torch.tensor([[-1.0, -1.0, -3.0]], requires_grad=True)
    value = rows_objective([row], logps, phase(kl=0.1))
    gaps = [-0.5, 1.0]
    expected = -1.0 + 3.0 - 0.1 * sum(math.exp(d) - d - 1 for d in gaps)
    assert value.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(value, logps)
    assert gradient[0].tolist() == pytest.approx(
        [1.0 - 0.1 * (1 - math.exp(-0.5)), 0.0, -1.0 - 0.1 * (1 - math.exp(1.0))]
    )


def test_clip_and_kl_add_up():
    row = rows_of([2.0], (-1.0,), (-1.2,))
    logps = torch.tensor([[-0.7]], requires_grad=True)
    value = rows_objective([row], logps, phase(clip=0.2, kl=0.5))
    assert value.item() == pytest.approx(2.0 * 1.2 - 0.5 * (math.exp(-0.5) + 0.5 - 1))


def test_padding_may_hold_anything():
    rows = [rows_of([1.0, 1.0, 1.0], (-1.0,) * 3, (-1.0,) * 3), rows_of([2.0], (-1.0,), (-1.0,))]
    nan, inf = float("nan"), float("-inf")
    logps = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, nan, inf]], requires_grad=True)
    for which in (phase(), phase(clip=0.2), phase(kl=0.1)):
        value = rows_objective(rows, logps, which)
        assert value.item() == pytest.approx(5.0 if which.clip is not None else -5.0)
        (gradient,) = torch.autograd.grad(value, logps)
        assert gradient.tolist() == [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]


# ---- the data set's own trace ------------------------------------------------------------------------------------


def test_the_fallback_rows_are_the_rationale_with_weight_one(prompts):
    g = group(prompts, problem(3, rationale="3 and 4"), [" x"])
    reasoner, posterior = dataset_rows(g, phase(trains=("reasoner", "posterior")), prompts)
    z, y = prompts.trace_ids("3 and 4"), prompts.answer_ids("7")
    assert reasoner == Row(
        "reasoner",
        prompts.prior_ids(g.problem),
        (*z, *prompts.cue_ids, *y),
        (1.0,) * len(z) + (0.0,) * len(prompts.cue_ids) + (1.0,) * len(y),
    )
    assert posterior == Row("posterior", prompts.hinted_ids(g.problem), z, (1.0,) * len(z))


def test_a_problem_without_a_rationale_is_named(prompts):
    with pytest.raises(UserError, match="'p3' has no rationale to fall back on: add a 'rationale' field"):
        dataset_rows(group(prompts, problem(3, rationale=None), [" x"]), phase(), prompts)


def test_the_samplers_numbers_are_those_of_the_very_answer(prompts):
    """One answer may end as another does: the cue between trace and answer tells them apart."""
    g = group(prompts, problem(3), [" 3+4"], answers=[["7", "17"]])
    trace = g.traces[0]
    short, long = (
        replace(a, ids=a.ids[-n:], logps=(-n / 8.0,) * n) for a, n in zip(trace.answers, (2, 3), strict=True)
    )
    assert long.ids[-2:] == short.ids
    g = replace(g, traces=(replace(trace, answers=(short, long)),))
    z, cue = trace.ids, prompts.cue_ids
    sampled = trace.completion.logps
    for answer in (short, long):
        joined = Row(
            "reasoner",
            trace.prompt_ids,
            (*z, *cue, *answer.ids),
            (1.0,) * (len(z) + len(cue) + len(answer.ids)),
        )
        assert sampler_logps(joined, g, cue) == (*sampled, *(0.0,) * len(cue), *answer.logps)
        behind = Row("reasoner", (*trace.prompt_ids, *z, *cue), answer.ids, (1.0,) * len(answer.ids))
        assert sampler_logps(behind, g, cue) == answer.logps
    assert sampler_logps(Row("reasoner", trace.prompt_ids, z, (1.0,) * len(z)), g, cue) == sampled
    other = Row("reasoner", trace.prompt_ids, (*z, *cue, *long.ids[:1], *long.ids), (1.0,) * 20)
    with pytest.raises(ValueError, match="'p3' was not drawn by the sampler"):
        sampler_logps(other, g, cue)
