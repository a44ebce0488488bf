"""Scores of sampled groups: densities against independent scoring, sampler log-probabilities reused only rightly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.unit.traces_parts import RIGHT, TEMPLATE, WRONG, answer, counting, group, problem
from vlm_reason.engines.base import Law, ScoreRequest
from vlm_reason.engines.rollout import Draw, roll_out
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.verifiers import make_verifier
from vlm_reason.traces import Component, Evidence, Phase, Proposal
from vlm_reason.traces.measure import measure, sampling_law, verify_answers
from vlm_reason.traces.mismatch import Mismatch, compare
from vlm_reason.traces.recipe import PRIOR, deal
from vlm_reason.traces.replay import CHAIN
from vlm_reason.types import Coefficients

PROBLEMS = [problem(1), problem(2), problem(3)]
PRIOR_HINTED = Proposal((Component("reasoner", "prior", 1.0), Component("posterior", "hinted", 3.0)))
BOTH = frozenset({"logp_prior", "logq"})


def phase(proposal=PRIOR, evidence=Evidence("one"), targets="none", needs=BOTH) -> Phase:  # noqa: B008
    return Phase(
        "test", lambda s, state: (Coefficients(), state), proposal=proposal, evidence=evidence,
        targets=targets, needs=frozenset(needs),
    )  # fmt: skip


@pytest.fixture
def prompts(tiny_tokenizer) -> PromptBuilder:
    return PromptBuilder(tiny_tokenizer, TEMPLATE)


@pytest.fixture
def engine(tiny_llama, tiny_tokenizer):
    return counting(tiny_llama, tiny_tokenizer)


def draw(engine, prompts, plan, problems=PROBLEMS, complete=True):
    """Real samples of the tiny model, which rarely closes a trace: called complete here, so that they are scored."""
    groups = roll_out(
        engine, prompts, problems, plan, run_seed=1, stream="prior", max_trace_tokens=12, max_answer_tokens=4,
        answers_per_trace=0,
    )  # fmt: skip
    if not complete:
        return groups
    return [
        replace(
            g, traces=tuple(replace(t, completion=replace(t.completion, finish="stop")) for t in g.traces)
        )
        for g in groups
    ]


def total(engine, context, target, law) -> float:
    """Scored by itself, with no neighbour in the batch."""
    return sum(engine.inner.score([ScoreRequest(context, target, law)])[0])


MIXED_PLAN = [Draw("reasoner/prior", "reasoner")] + [Draw("posterior/hinted", "posterior", hinted=True)] * 3


def test_a_mixtures_density_is_the_logsumexp_of_its_shares_and_components(engine, prompts):
    groups = draw(engine, prompts, MIXED_PLAN)
    scores = measure(groups, phase(PRIOR_HINTED), engine, prompts, None).scores
    for g, made in enumerate(groups):
        x, hinted = prompts.prior_ids(made.problem), prompts.hinted_ids(made.problem)
        for k, trace in enumerate(made.traces):
            prior = total(engine, x, trace.ids, Law("reasoner"))
            posterior = total(engine, hinted, trace.ids, Law("posterior"))
            density = math.log(0.25 * math.exp(prior) + 0.75 * math.exp(posterior))
            assert float(scores.logq[g, k]) == pytest.approx(density, abs=1e-3)
            assert float(scores.logp_prior[g, k]) == pytest.approx(prior, abs=1e-3)
            assert float(scores.length[g, k]) == len(trace.ids)
    # the balance heuristic: pi / r is at most 1 / share of pi
    assert bool((scores.logp_prior - scores.logq <= math.log(4) + 1e-5).all())


@pytest.mark.parametrize("chain", [False, True])
def test_the_shares_of_a_mixture_are_those_that_were_dealt(engine, prompts, chain):
    """Halves of 3 traces are 2 and 1: with these the mean of f / r over the slots is the sum of f, with halves not."""
    proposal = Proposal((Component("reasoner", "prior", 0.5), Component("posterior", "hinted", 0.5)))
    plan = [
        Draw(c.name, c.adapter, hinted=c.prompt == "hinted")  # as a window draws them
        for c in deal(proposal.components, 3)
    ]
    (made,) = draw(engine, prompts, plan, [PROBLEMS[0]])
    if chain:  # it was dealt to nobody
        made = replace(made, traces=(replace(made.traces[0], proposal=CHAIN), *made.traces))
    logq = measure([made], phase(proposal), engine, prompts, None).scores.logq[0]
    x, hinted = prompts.prior_ids(made.problem), prompts.hinted_ids(made.problem)
    for value, trace in zip(logq.tolist(), made.traces, strict=True):
        prior = total(engine, x, trace.ids, Law("reasoner"))
        posterior = total(engine, hinted, trace.ids, Law("posterior"))
        density = math.log(2 / 3 * math.exp(prior) + 1 / 3 * math.exp(posterior))
        assert value == pytest.approx(density, abs=1e-3)


def test_three_laws_are_kept_apart(engine, prompts):
    """Reasoner, posterior and base behind their own prompts; a mix-up would make two of these equal."""
    groups = draw(engine, prompts, [Draw("posterior/hinted", "posterior", hinted=True)] * 2)
    proposal = Proposal((Component("posterior", "hinted"),))
    scores = measure(groups, phase(proposal, needs=BOTH | {"logp_ref"}), engine, prompts, None).scores
    assert scores.logp_ref is not None
    trace = groups[1].traces[1]
    x, hinted = prompts.prior_ids(PROBLEMS[1]), prompts.hinted_ids(PROBLEMS[1])
    expected = [
        total(engine, x, trace.ids, Law("reasoner")),
        total(engine, hinted, trace.ids, Law("posterior")),
        total(engine, x, trace.ids, Law(None)),
    ]
    got = [float(t[1, 1]) for t in (scores.logp_prior, scores.logq, scores.logp_ref)]
    assert got == pytest.approx(expected, abs=1e-3)
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 0.05


def test_the_least_likely_token_is_over_trace_and_answer(engine, prompts):
    """Of complete traces; an incomplete one has -inf, and a phase that does not ask gets nothing."""
    groups = draw(engine, prompts, MIXED_PLAN)
    first = groups[0].traces[0]
    cut = replace(first, completion=replace(first.completion, finish="length"))
    groups[0] = replace(groups[0], traces=(cut, *groups[0].traces[1:]))
    asked = phase(PRIOR_HINTED, Evidence("logp"), "gold", needs=BOTH | {"worst_token"})
    worst = measure(groups, asked, engine, prompts, None).scores.worst_token
    assert worst is not None and float(worst[0, 0]) == -math.inf
    for g, made in enumerate(groups):
        x, y = prompts.prior_ids(made.problem), prompts.answer_ids(made.problem.answer)
        for k, trace in enumerate(made.traces):
            if trace.complete:
                behind = (*trace.ids, *prompts.cue_ids)
                requests = [
                    ScoreRequest(x, trace.ids, Law("reasoner")),
                    ScoreRequest((*x, *behind), y, Law("reasoner")),
                ]
                tokens = [t for logps in engine.inner.score(requests) for t in logps]
                assert float(worst[g, k]) == pytest.approx(min(tokens), abs=1e-3)
    assert measure(groups, phase(PRIOR_HINTED), engine, prompts, None).scores.worst_token is None


# ---- reuse of the sampler's numbers ----------------------------------------------------------------------------


def test_traces_of_the_model_itself_are_not_scored_again(engine, prompts):
    groups = draw(engine, prompts, [Draw()] * 2)
    measured = measure(groups, phase(PRIOR), engine, prompts, None)
    assert engine.scored == [] and measured.scored_tokens == 0
    for g, made in enumerate(groups):
        for k, trace in enumerate(made.traces):
            own = sum(trace.completion.logps)
            both = [float(measured.scores.logp_prior[g, k]), float(measured.scores.logq[g, k])]
            assert both == pytest.approx([own, own], rel=1e-6)
            assert own == pytest.approx(total(engine, trace.prompt_ids, trace.ids, Law("reasoner")), abs=1e-3)


def test_without_reuse_everything_is_scored_and_compared(engine, prompts):
    groups = draw(engine, prompts, [Draw()] * 2)
    reused = measure(groups, phase(PRIOR), engine, prompts, None)
    assert reused.reused_tokens == 2 * sum(len(t.ids) for g in groups for t in g.traces)  # for pi and for r
    assert reused.mismatch.metrics()["mismatch/mean"] is None
    scored = measure(groups, phase(PRIOR), engine, prompts, None, reuse=False)
    assert len(engine.scored) == len(set(engine.scored)) == 6 and scored.reused_tokens == 0
    for name in ("logp_prior", "logq"):
        ours, theirs = getattr(scored.scores, name), getattr(reused.scores, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert scored.mismatch.tokens == sum(len(t.ids) for g in groups for t in g.traces)
    assert scored.mismatch.largest < 1e-4


def test_some_traces_are_compared_with_the_scorer(engine, prompts):
    """Those of a sampler that lies by 0.1 nat a token are found out; the density stays the sampler's word."""
    groups = draw(engine, prompts, [Draw(temperature=0.5, top_p=0.9)] * 2)
    shifted = [
        replace(
            g,
            traces=tuple(
                replace(t, completion=replace(t.completion, logps=tuple(p - 0.1 for p in t.completion.logps)))
                for t in g.traces
            ),
        )
        for g in groups
    ]
    measured = measure(
        shifted, phase(PRIOR, needs=()), engine, prompts, None, temperature=0.5, top_p=0.9, compared=2
    )
    assert engine.scored == [
        ScoreRequest(g.traces[0].prompt_ids, g.traces[0].ids, Law("reasoner", 0.5, 0.9)) for g in groups[:2]
    ]
    metrics = measured.mismatch.metrics()
    assert metrics["mismatch/tokens"] == sum(len(g.traces[0].ids) for g in groups[:2])
    assert metrics["mismatch/mean"] == pytest.approx(0.1, abs=1e-4)
    assert metrics["mismatch/max"] == pytest.approx(0.1, abs=1e-4)
    assert metrics["mismatch/kl"] == pytest.approx(math.exp(0.1) - 0.1 - 1, abs=1e-5)
    assert metrics["mismatch/outside"] == 0


def test_mismatch_by_hand():
    a = compare([(-1.0, -2.0), (-0.5,)], [(-1.25, -1.5), (-math.inf,)])
    assert a == Mismatch(2, 0.75, 0.5, math.expm1(-0.25) + 0.25 + math.expm1(0.5) - 0.5, 1)
    b = compare([(-1.0,)], [(-2.0,)])
    assert a + b == compare([(-1.0, -2.0), (-0.5,), (-1.0,)], [(-1.25, -1.5), (-math.inf,), (-2.0,)])
    assert (a + b).metrics()["mismatch/mean"] == 1.75 / 3


def test_given_and_stored_traces_have_no_sampling_law(engine, prompts):
    trace = draw(engine, prompts, [Draw()])[0].traces[0]
    assert sampling_law(trace, 0.5, 0.9) == Law("reasoner", 0.5, 0.9)
    assert sampling_law(replace(trace, proposal="base/prior"), 1.0, 1.0) == Law(None)
    assert sampling_law(replace(trace, proposal="dataset"), 1.0, 1.0) is None
    assert sampling_law(replace(trace, proposal=CHAIN), 1.0, 1.0) is None


def test_a_tempered_trace_keeps_its_density_and_is_scored_for_the_prior(engine, prompts):
    groups = draw(engine, prompts, [Draw(temperature=0.5)] * 2)
    scores = measure(groups, phase(PRIOR), engine, prompts, None, temperature=0.5).scores
    assert engine.laws() == {
        Law("reasoner")
    }  # the prior is untempered; the tempered density came with the sample
    assert len(engine.scored) == 6
    trace = groups[0].traces[0]
    assert float(scores.logq[0, 0]) == pytest.approx(
        total(engine, trace.prompt_ids, trace.ids, Law("reasoner", 0.5)), abs=1e-3
    )
    assert float(scores.logp_prior[0, 0]) == pytest.approx(
        total(engine, trace.prompt_ids, trace.ids, Law("reasoner")), abs=1e-3
    )
    assert abs(float(scores.logq[0, 0] - scores.logp_prior[0, 0])) > 0.05


def test_a_trace_of_another_prompt_is_scored_again(engine, prompts, tiny_tokenizer):
    """Drawn behind a worked example, measured without it."""
    few_shot = PromptBuilder(tiny_tokenizer, TEMPLATE, shots=1)
    groups = draw(engine, few_shot, [Draw()], problems=PROBLEMS[:1])
    scores = measure(groups, phase(PRIOR), engine, prompts, None).scores
    trace = groups[0].traces[0]
    assert [r.context_ids for r in engine.scored] == [prompts.prior_ids(PROBLEMS[0])]  # once for pi and for r
    bare = total(engine, prompts.prior_ids(PROBLEMS[0]), trace.ids, Law("reasoner"))
    assert float(scores.logp_prior[0, 0]) == pytest.approx(bare, abs=1e-3)
    assert abs(bare - sum(trace.completion.logps)) > 0.05


def test_a_stored_chain_is_scored_under_todays_weights(engine, prompts):
    (made,) = draw(engine, prompts, [Draw()], problems=PROBLEMS[:1])
    stale = replace(
        made.traces[0], proposal="chain", completion=replace(made.traces[0].completion, logps=(9.0,))
    )
    chained = replace(made, traces=(stale,))
    which = phase(Proposal((Component(),), chain=True), needs={"logp_prior"})
    scores = measure([chained], which, engine, prompts, None).scores
    assert len(engine.scored) == 1
    assert float(scores.logp_prior[0, 0]) == pytest.approx(
        total(engine, stale.prompt_ids, stale.ids, Law("reasoner")), abs=1e-3
    )
    assert scores.chain is not None and scores.chain.tolist() == [[True]]


def test_an_incomplete_trace_is_not_forwarded(engine, prompts):
    """Its evidence is 0 whatever the laws say of it."""
    groups = draw(engine, prompts, MIXED_PLAN, complete=False)
    done = {t.ids for g in groups for t in g.traces if t.complete}
    scores = measure(groups, phase(PRIOR_HINTED, Evidence("logp")), engine, prompts, None).scores
    for g, made in enumerate(groups):
        for k, trace in enumerate(made.traces):
            if not trace.complete:
                assert float(scores.log_evidence[g, k]) == -math.inf
                assert all(
                    trace.ids not in (r.target_ids, r.target_ids[: len(trace.ids)]) for r in engine.scored
                )
    assert len(done) < 12  # or nothing was tested
    assert bool(torch.isfinite(scores.logq).all() and torch.isfinite(scores.logp_prior).all())


def test_equal_traces_are_forwarded_once(engine, prompts):
    groups = [group(prompts, PROBLEMS[0], [" 1+2", " 1+2", " 3"], proposal="posterior/hinted")]
    measured = measure(groups, phase(PRIOR, Evidence("logp"), needs={"logp_prior"}), engine, prompts, None)
    assert len(engine.scored) == 2
    assert measured.scored_tokens == sum(len(r.context_ids) + len(r.target_ids) for r in engine.scored)
    scores = measured.scores
    assert scores.logp_prior[0, 0] == scores.logp_prior[0, 1] != scores.logp_prior[0, 2]
    assert scores.log_evidence[0, 0] == scores.log_evidence[0, 1] != scores.log_evidence[0, 2]


def test_trace_and_answer_come_out_of_one_forward(engine, prompts):
    """log pi(z|x) and log pi(y*|x,z) of a trace of another law: one request, cut at the cue."""
    groups = [group(prompts, PROBLEMS[0], [" 1+2"], proposal="posterior/hinted")]
    scores = measure(
        groups, phase(PRIOR, Evidence("logp"), needs={"logp_prior"}), engine, prompts, None
    ).scores
    assert len(engine.scored) == 1
    x, z, y = prompts.prior_ids(PROBLEMS[0]), groups[0].traces[0].ids, prompts.answer_ids("3")
    assert float(scores.logp_prior[0, 0]) == pytest.approx(total(engine, x, z, Law("reasoner")), abs=1e-3)
    assert float(scores.log_evidence[0, 0]) == pytest.approx(
        total(engine, (*x, *z, *prompts.cue_ids), y, Law("reasoner")), abs=1e-3
    )


@pytest.mark.parametrize(
    ("proposal", "temperature", "needs", "known"),
    [
        ("reasoner/prior", 1.0, (), True),  # draws of pi: the ratio is 1
        ("reasoner/prior", 0.5, (), False),
        ("posterior/hinted", 1.0, (), False),
        ("posterior/hinted", 1.0, ("logp_prior",), False),
        ("posterior/hinted", 1.0, BOTH, True),
        ("dataset", 1.0, (), False),
    ],
)
def test_the_ratio_is_known_when_it_was_measured_or_is_one(
    engine, prompts, proposal, temperature, needs, known
):
    groups = [group(prompts, PROBLEMS[0], [" 1+2"], proposal=proposal)]
    measured = measure(groups, phase(needs=needs), engine, prompts, None, temperature=temperature)
    assert measured.ratio_known == known


def test_only_what_the_phase_needs_is_scored(engine, prompts):
    groups = draw(engine, prompts, MIXED_PLAN)
    scores = measure(groups, phase(PRIOR_HINTED, needs=()), engine, prompts, None).scores
    assert engine.scored == []
    assert scores.logp_ref is None and scores.chain is None and scores.logp_empty is None
    assert scores.logp_prior.abs().sum() == 0 and scores.logq.abs().sum() == 0


# ---- answers, evidence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logp", "mean_logp", "mean_p"])
def test_the_reference_answer_is_scored_behind_prompt_trace_and_cue(engine, prompts, kind):
    groups = [group(prompts, PROBLEMS[0], [" 1+2", " cut"], finish=["stop", "length"])]
    scores = measure(groups, phase(evidence=Evidence(kind), needs=()), engine, prompts, None).scores
    y = prompts.answer_ids("3")
    context = (*prompts.prior_ids(PROBLEMS[0]), *groups[0].traces[0].ids, *prompts.cue_ids)
    logps = torch.tensor(engine.inner.score([ScoreRequest(context, y, Law("reasoner"))])[0])
    expected = {"logp": logps.sum(), "mean_logp": logps.mean(), "mean_p": logps.exp().mean().log()}[kind]
    assert float(scores.log_evidence[0, 0]) == pytest.approx(float(expected), abs=1e-3)
    assert float(scores.log_evidence[0, 1]) == -math.inf  # a cut trace is never scored as if it were whole
    assert float(scores.logp_answer[0, 0, 0]) == pytest.approx(float(logps.sum()), abs=1e-3)
    assert scores.answer_weight[0, :, 0].tolist() == [1.0, 0.0]
    assert len(engine.scored) == 1


def test_no_trace_is_measured_behind_the_empty_trace(engine, prompts):
    groups = [group(prompts, PROBLEMS[0], [" 1+2"])]
    scores = measure(
        groups, phase(evidence=Evidence("minus_no_trace"), needs=()), engine, prompts, None
    ).scores
    y = prompts.answer_ids("3")
    empty, full = (
        torch.tensor(engine.inner.score([ScoreRequest(c, y, Law("reasoner"))])[0]).exp().mean()
        for c in (
            prompts.direct_ids(PROBLEMS[0]),
            (*prompts.prior_ids(PROBLEMS[0]), *groups[0].traces[0].ids, *prompts.cue_ids),
        )
    )
    assert scores.logp_empty is not None
    assert float(scores.logp_empty[0].exp()) == pytest.approx(float(empty), abs=1e-4)
    assert float(scores.log_evidence[0, 0].exp()) == pytest.approx(max(0.0, float(full - empty)), abs=1e-4)


def test_accuracy_and_answer_targets_come_from_the_verdicts(engine, prompts):
    groups = [
        group(prompts, PROBLEMS[0], [" a", " b"], answers=[["3", "4", "3"], []], finish=["stop", "length"])
    ]
    which = phase(evidence=Evidence("accuracy", samples=3), targets="sampled", needs=())
    measured = measure(groups, which, engine, prompts, make_verifier("number"))
    assert [[v.correct for v in ks] for ks in measured.verdicts[0]] == [[True, False, True], []]
    assert float(measured.scores.log_evidence[0, 0].exp()) == pytest.approx(2 / 3)
    assert float(measured.scores.log_evidence[0, 1]) == -math.inf
    assert measured.scores.answer_weight[0].tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    tokens = len(prompts.answer_ids("3"))
    assert measured.scores.logp_answer[0, 0].tolist() == pytest.approx([-0.5 * tokens] * 3)


def test_an_answer_that_was_cut_or_says_nothing_is_wrong(prompts):
    whole = answer(prompts, "3")
    cut, blank = replace(whole, finish="length"), replace(whole, text=" \n")
    made = group(prompts, PROBLEMS[0], [" a"])
    made = replace(made, traces=(replace(made.traces[0], answers=(whole, cut, blank)),))
    verdicts = verify_answers([made], make_verifier("number"), prompts)
    assert [v.correct for v in verdicts[0][0]] == [RIGHT.correct, WRONG.correct, WRONG.correct]
    assert verify_answers([made], None, prompts) == (((),),)


def test_short_groups_are_masked(engine, prompts):
    groups = [group(prompts, PROBLEMS[0], [" a", " b"]), group(prompts, PROBLEMS[1], [" c"])]
    scores = measure(groups, phase(), engine, prompts, None).scores
    assert scores.mask.tolist() == [[True, True], [True, False]]
    assert scores.log_evidence.tolist() == [[0.0, 0.0], [0.0, -math.inf]]


def test_ones_own_evidence(engine, prompts):
    groups = [group(prompts, PROBLEMS[0], [" a", " b", " c"], finish=["stop", "stop", "length"])]
    scores = measure(
        groups, phase(), engine, prompts, None, callable_evidence=lambda g: [0.5, 0.0, 1.0]
    ).scores
    assert scores.log_evidence.exp().tolist() == [[0.5, 0.0, 0.0]]  # an incomplete trace has none
    for bad in ([0.5, 0.5], [0.5, -1.0, 0.0], [0.5, float("nan"), 0.0]):
        with pytest.raises(ValueError, match="'p1' must be 3 finite numbers >= 0, got"):
            measure(groups, phase(), engine, prompts, None, callable_evidence=lambda g, bad=bad: bad)
