"""From sampled groups to `Scores`: only the passes the phase asks for, each trace scored under the law it needs.

Sampler log-probabilities are reused where the law is the one wanted (same weights, same prompt, same temperature):
a trace is then not forwarded twice. Everything else is one `engine.score` call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engines.base import Engine, Law, ScoreRequest
from ..engines.rollout import answer_context
from ..tasks.prompts import PromptBuilder
from ..tasks.verifiers import Verdict, Verifier
from ..types import Completion, Problem, Scores, TraceGroup
from . import evidence
from .recipe import Component, Phase

EvidenceFunction = Callable[[TraceGroup], Sequence[float]]
"""A user's own evidence: the K numbers e >= 0 of a group."""


@dataclass(frozen=True)
class Measured:
    """Scores of a batch of groups with what the diagnostics read beside them."""

    scores: Scores
    verdicts: tuple[tuple[tuple[Verdict, ...], ...], ...]
    scored_tokens: int


@dataclass
class _Scorer:
    """Counts the tokens that one batch's scoring passes forward."""

    engine: Engine
    progress: str | None
    tokens: int = 0

    def __call__(self, requests: Sequence[ScoreRequest], what: str) -> list[tuple[float, ...]]:
        if not requests:
            return []
        self.tokens += sum(len(r.context_ids) + len(r.target_ids) for r in requests)
        return self.engine.score(requests, progress=self.progress and f"{self.progress}: {what}")


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
    gold = _gold_logps(groups, phase, prompts, score)
    log_evidence, empty = _evidence(
        groups, phase, prompts, score, verdicts, gold, length, width, callable_evidence
    )
    logq = torch.zeros(len(groups), width)
    if "logq" in phase.needs:
        logq = _proposal_density(groups, phase, prompts, score, temperature, top_p, width)
    logp_prior = torch.zeros(len(groups), width)
    if "logp_prior" in phase.needs:
        law, name = Law("reasoner"), "reasoner/prior"
        logp_prior = _trace_logps(groups, law, name, prompts.prior_ids, score, temperature, top_p, width)
    logp_ref = None
    if "logp_ref" in phase.needs:
        logp_ref = _trace_logps(
            groups, Law(None), "base/prior", prompts.prior_ids, score, temperature, top_p, width
        )
    logp_answer, answer_weight = _answers(groups, phase, gold, verdicts, width)
    scores = Scores(
        logp_prior=logp_prior,
        logq=logq,
        log_evidence=log_evidence.masked_fill(~mask, float("-inf")),
        logp_answer=logp_answer,
        answer_weight=answer_weight,
        length=length,
        mask=mask,
        logp_ref=logp_ref,
        chain=_chain(groups, width) if phase.proposal.chain else None,
        logp_empty=empty,
    )
    return Measured(scores, verdicts, score.tokens)


def verify_answers(
    groups: Sequence[TraceGroup], verifier: Verifier | None, prompts: PromptBuilder
) -> tuple[tuple[tuple[Verdict, ...], ...], ...]:
    """The verdict on every sampled answer, [group][trace][answer]. An answer that was cut off is wrong,
    whatever it says so far; so is one that cannot be parsed. Empty where nothing was sampled or there is no
    verifier."""

    def verdict(problem: Problem, answer: Completion) -> Verdict:
        assert verifier is not None
        parsed = prompts.parse_answer(answer.text) if answer.complete else None
        return verifier.verify(problem, parsed or "")

    return tuple(
        tuple(
            () if verifier is None else tuple(verdict(group.problem, a) for a in t.answers)
            for t in group.traces
        )
        for group in groups
    )


def _wants_gold(phase: Phase) -> bool:
    kinds = ("logp", "mean_logp", "mean_p", "minus_no_trace", "perplexity_rank")
    return phase.evidence.kind in kinds or "logp_answer" in phase.needs


def _gold_logps(
    groups: Sequence[TraceGroup], phase: Phase, prompts: PromptBuilder, score: _Scorer
) -> list[list[tuple[float, ...]]]:
    """log pi(y*_t | x, z, y*_<t) of every complete trace; () for an incomplete one."""
    out: list[list[tuple[float, ...]]] = [[() for _ in group.traces] for group in groups]
    if not _wants_gold(phase):
        return out
    where = [(g, k) for g, group in enumerate(groups) for k, t in enumerate(group.traces) if t.complete]
    requests = [
        ScoreRequest(
            answer_context(prompts, groups[g].problem, groups[g].traces[k].ids),
            prompts.answer_ids(groups[g].problem.answer),
            Law("reasoner"),
        )
        for g, k in where
    ]
    for (g, k), logps in zip(where, score(requests, "answers"), strict=True):
        out[g][k] = logps
    return out


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
    the sampler's own log-probabilities."""
    out = torch.zeros(len(groups), width)
    sampled_alike = (law.temperature, law.top_p) == (temperature, top_p)
    where, requests = [], []
    for g, group in enumerate(groups):
        context = prompt(group.problem)
        for k, trace in enumerate(group.traces):
            if sampled_alike and trace.proposal == name and trace.prompt_ids == tuple(context):
                out[g, k] = torch.tensor(trace.completion.logps, dtype=torch.float32).sum()
            else:
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
            out[g, k] = trace.proposal == "chain"
    return out
