"""From sampled groups to `Scores`: only the passes the phase asks for, each trace scored under the law it needs.

Sampler log-probabilities are reused where the law is the one wanted (same weights, same prompt, same temperature):
a trace is then not forwarded twice. Everything else is one `engine.score` call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engines.base import Engine, Law, ScoreRequest
from ..tasks.prompts import PromptBuilder
from ..tasks.verifiers import Verdict, Verifier, verdict_on
from ..types import Scores, TraceGroup
from . import evidence
from .recipe import PRIOR, Component, Phase
from .replay import CHAIN

PRIOR_NAME = PRIOR.components[0].name
EvidenceFunction = Callable[[TraceGroup], Sequence[float]]
"""A user's own evidence: the K numbers e >= 0 of a group."""


@dataclass(frozen=True)
class Measured:
    """Scores of a batch of groups with what the diagnostics read beside them.

    ratio_known: logp_prior - logq is log pi(z|x) - log r(z): both were measured, or every trace is a draw of pi.
    right[g][k]: how right trace k is, the mean score of its sampled answers, or pi(y*|x,z) where the reference answer
    was scored instead (the same in expectation, without the draw); 0 for an incomplete trace; absent where neither is.
    """

    scores: Scores
    verdicts: tuple[tuple[tuple[Verdict, ...], ...], ...]
    scored_tokens: int
    ratio_known: bool
    right: tuple[tuple[float, ...], ...] | None = None


@dataclass
class _Scorer:
    """Counts the tokens that one batch's scoring passes forward."""

    engine: Engine
    progress: str | None
    tokens: int = 0

    def __call__(self, requests: Sequence[ScoreRequest], what: str) -> list[tuple[float, ...]]:
        """Equal requests are forwarded once: groups of an easy problem are full of the same trace."""
        distinct = list(dict.fromkeys(requests))
        if not distinct:
            return []
        self.tokens += sum(len(r.context_ids) + len(r.target_ids) for r in distinct)
        scored = self.engine.score(distinct, progress=self.progress and f"{self.progress}: {what}")
        by_request = dict(zip(distinct, scored, strict=True))
        return [by_request[r] for r in requests]


def measure(
    groups: Sequence[TraceGroup],
    phase: Phase,
    engine: Engine,
    prompts: PromptBuilder,
    verifier: Verifier | None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    callable_evidence: EvidenceFunction | None = None,
    progress: str | None = None,
) -> Measured:
    """Score `groups` for `phase`. Tensors are fp32 on the CPU, detached; short groups are masked."""
    width = max(len(group.traces) for group in groups)
    score = _Scorer(engine, progress)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    length = torch.zeros(len(groups), width)
    for g, group in enumerate(groups):
        mask[g, : len(group.traces)] = True
        for k, trace in enumerate(group.traces):
            length[g, k] = len(trace.ids)
    verdicts = verify_answers(groups, verifier, prompts)
    prior = _prior_pass(groups, phase, prompts, score, (temperature, top_p))
    gold = prior.answer
    log_evidence, empty = _evidence(
        groups, phase, prompts, score, verdicts, gold, length, width, callable_evidence
    )
    logq = torch.zeros(len(groups), width)
    if "logq" in phase.needs:
        logq = _proposal_density(groups, phase, prompts, score, temperature, top_p, width)
    logp_ref = None
    if "logp_ref" in phase.needs:
        logp_ref = _trace_logps(
            groups, Law(None), "base/prior", prompts.prior_ids, score, temperature, top_p, width
        )
    logp_answer, answer_weight = _answers(groups, phase, gold, verdicts, width)
    scores = Scores(
        logp_prior=prior.total(width),
        logq=logq,
        log_evidence=log_evidence.masked_fill(~mask, float("-inf")),
        logp_answer=logp_answer,
        answer_weight=answer_weight,
        length=length,
        mask=mask,
        logp_ref=logp_ref,
        chain=_chain(groups, width) if phase.proposal.chain else None,
        logp_empty=empty,
        worst_token=prior.worst(width) if "worst_token" in phase.needs else None,
    )
    measured_ratio = {"logp_prior", "logq"} <= phase.needs and bool(phase.proposal.components)
    ratio_known = measured_ratio or ((temperature, top_p) == (1.0, 1.0) and _all_from_prior(groups))
    return Measured(scores, verdicts, score.tokens, ratio_known, _right(phase, verdicts, gold))


def _right(
    phase: Phase,
    verdicts: Sequence[Sequence[Sequence[Verdict]]],
    gold: Sequence[Sequence[tuple[float, ...]]],
) -> tuple[tuple[float, ...], ...] | None:
    if any(answers for traces in verdicts for answers in traces):
        return tuple(
            tuple(sum(v.score for v in a) / len(a) if a else 0.0 for a in traces) for traces in verdicts
        )
    if wants_gold(phase):
        return tuple(tuple(math.exp(sum(y)) if y else 0.0 for y in traces) for traces in gold)
    return None


def _all_from_prior(groups: Sequence[TraceGroup]) -> bool:
    """Whether every fresh trace was drawn by the model as it will be used (stored chains aside)."""
    return all(t.proposal in (PRIOR_NAME, CHAIN) for group in groups for t in group.traces)


def verify_answers(
    groups: Sequence[TraceGroup], verifier: Verifier | None, prompts: PromptBuilder
) -> tuple[tuple[tuple[Verdict, ...], ...], ...]:
    """The verdict on every sampled answer, [group][trace][answer]. An answer that was cut off is wrong,
    whatever it says so far; so is one that cannot be parsed. Empty where nothing was sampled or there is no
    verifier."""

    if verifier is None:
        return tuple(tuple(() for _ in group.traces) for group in groups)
    return tuple(
        tuple(tuple(verdict_on(verifier, prompts, group.problem, a) for a in t.answers) for t in group.traces)
        for group in groups
    )


def wants_gold(phase: Phase) -> bool:
    """Whether the reference answer is scored behind the traces."""
    kinds = ("logp", "mean_logp", "mean_p", "minus_no_trace", "perplexity_rank")
    return phase.evidence.kind in kinds or "logp_answer" in phase.needs


@dataclass(frozen=True)
class _PriorPass:
    """Token log-probabilities of pi behind the prior prompt, [g][k]: of each trace, and of the reference answer
    behind it. () where there was nothing to score: an incomplete trace has evidence 0, whatever pi says of it."""

    trace: list[list[tuple[float, ...]]]
    answer: list[list[tuple[float, ...]]]

    def total(self, width: int) -> Tensor:
        """log pi(z|x), [G, K]."""
        return _table(self.trace, width, 0.0, sum)

    def worst(self, width: int) -> Tensor:
        """min_t log pi over the tokens of z and y*, [G, K]; -inf for an incomplete trace."""
        both = [
            [z + y for z, y in zip(zs, ys, strict=True)]
            for zs, ys in zip(self.trace, self.answer, strict=True)
        ]
        return _table(both, width, float("-inf"), min)


def _table(
    values: list[list[tuple[float, ...]]],
    width: int,
    empty: float,
    reduce: Callable[[tuple[float, ...]], float],
) -> Tensor:
    out = torch.full((len(values), width), empty)
    for g, group in enumerate(values):
        for k, tokens in enumerate(group):
            if tokens:
                out[g, k] = reduce(tokens)
    return out


def _prior_pass(
    groups: Sequence[TraceGroup],
    phase: Phase,
    prompts: PromptBuilder,
    score: _Scorer,
    sampled: tuple[float, float],
) -> _PriorPass:
    """One forward over [x | z | cue | y*] gives both factors. A trace that this law drew (temperature and top-p 1)
    keeps the sampler's own log-probabilities; it is forwarded only for the answer behind it."""
    wants_trace = bool(phase.needs & {"logp_prior", "worst_token"})
    result = _PriorPass([[() for _ in g.traces] for g in groups], [[() for _ in g.traces] for g in groups])
    if not wants_trace and not wants_gold(phase):
        return result
    where: list[tuple[int, int, int, int]] = []  # group, trace, target tokens of z, of y*
    requests: list[ScoreRequest] = []
    for g, group in enumerate(groups):
        prompt, y = tuple(prompts.prior_ids(group.problem)), prompts.answer_ids(group.problem.answer)
        for k, trace in enumerate(group.traces):
            if not trace.complete:
                continue
            own = sampled == (1.0, 1.0) and trace.proposal == PRIOR_NAME and trace.prompt_ids == prompt
            if own and wants_trace:
                result.trace[g][k] = trace.completion.logps
            if not wants_gold(phase):
                if not own:
                    where.append((g, k, len(trace.ids), 0))
                    requests.append(ScoreRequest(prompt, trace.ids, Law("reasoner")))
                continue
            # the trace is a target only where its log-probabilities are still wanted: targets cost an LM-head row each
            scored = 0 if own or not wants_trace else len(trace.ids)
            behind = (*trace.ids, *prompts.cue_ids)
            context, target = (prompt, (*behind, *y)) if scored else ((*prompt, *behind), y)
            where.append((g, k, scored, len(y)))
            requests.append(ScoreRequest(context, target, Law("reasoner")))
    for (g, k, of_trace, of_answer), logps in zip(where, score(requests, "prior"), strict=True):
        if of_trace:
            result.trace[g][k] = logps[:of_trace]
        if of_answer:
            result.answer[g][k] = logps[-of_answer:]
    return result


def _evidence(
    groups: Sequence[TraceGroup],
    phase: Phase,
    prompts: PromptBuilder,
    score: _Scorer,
    verdicts: Sequence[Sequence[Sequence[Verdict]]],
    gold: list[list[tuple[float, ...]]],
    length: Tensor,
    width: int,
    callable_evidence: EvidenceFunction | None,
) -> tuple[Tensor, Tensor | None]:
    """(log e [G, K], log of the same without a trace [G] or None)."""
    kind = phase.evidence.kind
    if callable_evidence is not None:
        return _called(groups, callable_evidence, width), None
    if kind in ("accuracy", "verifier"):
        return evidence.accuracy(verdicts, width), None
    if kind == "logp":
        return evidence.answer_logp(gold, width), None
    if kind == "mean_logp":
        return evidence.answer_mean_logp(gold, width), None
    if kind == "mean_p":
        return evidence.answer_mean_p(gold, width), None
    if kind == "perplexity_rank":
        return evidence.perplexity_rank(evidence.answer_mean_logp(gold, width), length), None
    if kind == "minus_no_trace":
        requests = [
            ScoreRequest(prompts.direct_ids(g.problem), prompts.answer_ids(g.problem.answer), Law("reasoner"))
            for g in groups
        ]
        empty = evidence.answer_mean_p([[logps] for logps in score(requests, "no trace")], 1)[:, 0]
        return evidence.minus_no_trace(evidence.answer_mean_p(gold, width), empty), empty
    return evidence.complete(groups, width), None


def _called(groups: Sequence[TraceGroup], function: EvidenceFunction, width: int) -> Tensor:
    out = torch.full((len(groups), width), float("-inf"))
    for g, group in enumerate(groups):
        values = torch.tensor(list(function(group)), dtype=torch.float32)
        if (
            values.shape != (len(group.traces),)
            or bool((values < 0).any())
            or not bool(torch.isfinite(values).all())
        ):
            raise ValueError(
                f"evidence of problem {group.problem.id!r} must be {len(group.traces)} finite numbers >= 0, "
                f"got {values.tolist()}"
            )
        done = torch.tensor([t.complete for t in group.traces])
        out[g, : len(values)] = torch.where(done, values, torch.zeros_like(values)).log()
    return out


def _trace_logps(
    groups: Sequence[TraceGroup],
    law: Law,
    name: str,
    prompt: Callable,
    score: _Scorer,
    temperature: float,
    top_p: float,
    width: int,
) -> Tensor:
    """log-probability of every trace under `law` behind `prompt`; [G, K]. A trace that this very law drew keeps
    the sampler's own log-probabilities; an incomplete one that it did not draw stays 0, its evidence being 0."""
    out = torch.zeros(len(groups), width)
    sampled_alike = (law.temperature, law.top_p) == (temperature, top_p)
    where, requests = [], []
    for g, group in enumerate(groups):
        context = prompt(group.problem)
        for k, trace in enumerate(group.traces):
            if sampled_alike and trace.proposal == name and trace.prompt_ids == tuple(context):
                out[g, k] = torch.tensor(trace.completion.logps, dtype=torch.float32).sum()
            elif trace.complete:
                where.append((g, k))
                requests.append(ScoreRequest(context, trace.ids, law))
    for (g, k), logps in zip(where, score(requests, name), strict=True):
        out[g, k] = torch.tensor(logps, dtype=torch.float32).sum()
    return out


def _proposal_density(
    groups: Sequence[TraceGroup],
    phase: Phase,
    prompts: PromptBuilder,
    score: _Scorer,
    temperature: float,
    top_p: float,
    width: int,
) -> Tensor:
    """log r(z) = logsumexp_c [log share_c + log r_c(z)] under the laws that sampled; [G, K]."""
    components = phase.proposal.components
    if not components:
        return torch.zeros(len(groups), width)
    total = sum(c.share for c in components)
    terms = []
    for component in components:
        law = Law(adapter_name(component), temperature, top_p)
        prompt = prompts.hinted_ids if component.prompt == "hinted" else prompts.prior_ids
        logps = _trace_logps(groups, law, component.name, prompt, score, temperature, top_p, width)
        terms.append(torch.tensor(component.share / total).log() + logps)
    return torch.logsumexp(torch.stack(terms), dim=0)


def adapter_name(component: Component) -> str | None:
    return None if component.adapter == "base" else component.adapter


def _answers(
    groups: Sequence[TraceGroup],
    phase: Phase,
    gold: list[list[tuple[float, ...]]],
    verdicts: Sequence[Sequence[Sequence[Verdict]]],
    width: int,
) -> tuple[Tensor, Tensor]:
    """(log pi(y_m|x,z), answer weight), both [G, K, M]; y_m: the reference answer (M = 1) or the sampled ones."""
    m = phase.evidence.samples if phase.targets == "sampled" else 1
    logp = torch.full((len(groups), width, m), float("-inf"))
    weight = torch.zeros(len(groups), width, m)
    for g, group in enumerate(groups):
        for k, trace in enumerate(group.traces):
            if phase.targets == "sampled":
                for i, (answer, verdict) in enumerate(zip(trace.answers, verdicts[g][k], strict=True)):
                    logp[g, k, i] = sum(answer.logps)
                    weight[g, k, i] = verdict.score
            elif trace.complete:
                weight[g, k, 0] = 1.0
                if gold[g][k]:
                    logp[g, k, 0] = sum(gold[g][k])
    return logp, weight


def _chain(groups: Sequence[TraceGroup], width: int) -> Tensor:
    out = torch.zeros(len(groups), width, dtype=torch.bool)
    for g, group in enumerate(groups):
        for k, trace in enumerate(group.traces):
            out[g, k] = trace.proposal == CHAIN
    return out
