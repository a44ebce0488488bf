"""From sampled groups to `Scores`: only the passes the phase asks for, each trace scored under the law it needs.

Sampler log-probabilities are reused where the law is the one wanted (same weights, same prompt, same temperature):
a trace is then not forwarded twice. Everything else is one `engine.score` call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engines.base import Engine, Law, ScoreRequest
from ..tasks.prompts import PromptBuilder
from ..tasks.verifiers import Verdict, Verifier, verdict_on
from ..types import Scores, Trace, TraceGroup
from . import evidence
from .mismatch import Mismatch, compare
from .recipe import PRIOR, Component, Phase, dealt_counts
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
    reused_tokens: tokens whose log-probability is the sampler's own, so that no pass was run for it.
    mismatch: sampler against scorer, over the traces that were compared.
    """

    scores: Scores
    verdicts: tuple[tuple[tuple[Verdict, ...], ...], ...]
    scored_tokens: int
    ratio_known: bool
    right: tuple[tuple[float, ...], ...] | None = None
    reused_tokens: int = 0
    mismatch: Mismatch = Mismatch()


@dataclass
class _Scorer:
    """Scores a batch, everything once: what was scored before, under the same law behind the same context, is taken
    from there, and a trace that the sampler drew under that law keeps the sampler's numbers (`reuse`).

    law: temperature and top-p of the sampler. tokens: forwarded. reused: taken from the sampler.
    """

    engine: Engine
    progress: str | None
    law: tuple[float, float]
    reuse: bool = True
    tokens: int = 0
    reused: int = 0
    known: dict[tuple[tuple[int, ...], Law], list[tuple[tuple[int, ...], tuple[float, ...]]]] = field(
        default_factory=dict
    )

    def __call__(self, requests: Sequence[ScoreRequest], what: str) -> list[tuple[float, ...]]:
        """Equal requests are forwarded once: groups of an easy problem are full of the same trace."""
        fresh = [r for r in dict.fromkeys(requests) if self._known(r) is None]
        if fresh:
            self.tokens += sum(len(r.context_ids) + len(r.target_ids) for r in fresh)
            scored = self.engine.score(fresh, progress=self.progress and f"{self.progress}: {what}")
            for r, logps in zip(fresh, scored, strict=True):
                self.known.setdefault((r.context_ids, r.law), []).append((r.target_ids, logps))
        found = [self._known(r) for r in requests]
        return [logps for logps in found if logps is not None]

    def sampled(self, trace: Trace, law: Law, prompt: Sequence[int]) -> tuple[float, ...] | None:
        """The sampler's own log-probabilities of `trace`, if `law` behind `prompt` is what drew it."""
        if not self.reuse or trace.prompt_ids != tuple(prompt) or sampling_law(trace, *self.law) != law:
            return None
        self.reused += len(trace.ids)
        return trace.completion.logps

    def _known(self, request: ScoreRequest) -> tuple[float, ...] | None:
        target = request.target_ids
        for other, logps in self.known.get((request.context_ids, request.law), ()):
            if other[: len(target)] == target:
                return logps[: len(target)]
        return None


def sampling_law(trace: Trace, temperature: float, top_p: float) -> Law | None:
    """What drew `trace`; None for one that was given, or kept from an earlier window."""
    adapter = trace.proposal.partition("/")[0]
    if adapter not in ("reasoner", "posterior", "base"):
        return None
    return Law(None if adapter == "base" else adapter, temperature, top_p)


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
    reuse: bool = True,
    stale: bool = False,
    compared: int = 0,
    progress: str | None = None,
) -> Measured:
    """Score `groups` for `phase`. Tensors are fp32 on the CPU, detached; short groups are masked.

    reuse: a trace keeps the sampler's log-probabilities wherever the law asked for is the law that drew it.
    stale: an earlier version of the weights drew the traces: the sampler's numbers are then the density that drew them
    (logq), and never log pi. The comparison of sampler and scorer shows the staleness too.
    compared: of how many traces (one a group, from the first group on) sampler and scorer are compared; with `reuse`
    off, of all.
    """
    width = max(len(group.traces) for group in groups)
    score = _Scorer(engine, progress, (temperature, top_p), reuse)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    length = torch.zeros(len(groups), width)
    for g, group in enumerate(groups):
        mask[g, : len(group.traces)] = True
        for k, trace in enumerate(group.traces):
            length[g, k] = len(trace.ids)
    verdicts = verify_answers(groups, verifier, prompts)
    prior = _prior_pass(groups, phase, prompts, score, stale)
    gold = prior.answer
    log_evidence, empty = _evidence(
        groups, phase, prompts, score, verdicts, gold, length, width, callable_evidence
    )
    logq = torch.zeros(len(groups), width)
    if "logq" in phase.needs:
        logq = _proposal_density(groups, phase, prompts, score, width)
    logp_ref = None
    if "logp_ref" in phase.needs:
        logp_ref = _trace_logps(groups, Law(None), "reference", prompts.prior_ids, score, width)
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
    on_policy = not stale and (temperature, top_p) == (1.0, 1.0) and _all_from_prior(groups)
    ratio_known = measured_ratio or on_policy
    mismatch = _compare(groups, score, compared)
    right = _right(phase, verdicts, gold)
    return Measured(scores, verdicts, score.tokens, ratio_known, right, score.reused, mismatch)


def _compare(groups: Sequence[TraceGroup], score: _Scorer, compared: int) -> Mismatch:
    """Sampler against scorer: one trace a group, of the first `compared` groups; all traces with reuse off."""
    chosen = (
        [t for g in groups for t in g.traces] if not score.reuse else [g.traces[0] for g in groups[:compared]]
    )
    pairs = [(t, law) for t in chosen if (law := sampling_law(t, *score.law)) is not None]
    scored = score([ScoreRequest(t.prompt_ids, t.ids, law) for t, law in pairs], "comparison")
    return compare([t.completion.logps for t, _ in pairs], scored)


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
    stale: bool,
) -> _PriorPass:
    """One forward over [x | z | cue | y*] gives both factors. A trace that this law drew (temperature and top-p 1)
    keeps the sampler's own log-probabilities; it is forwarded only for the answer behind it."""
    law = Law("reasoner")
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
            own = score.sampled(trace, law, prompt) if wants_trace and not stale else None
            if own is not None:
                result.trace[g][k] = own
            if not wants_gold(phase):
                if own is None:
                    where.append((g, k, len(trace.ids), 0))
                    requests.append(ScoreRequest(prompt, trace.ids, law))
                continue
            # the trace is a target only where its log-probabilities are still wanted: targets cost an LM-head row each
            scored = len(trace.ids) if wants_trace and own is None else 0
            behind = (*trace.ids, *prompts.cue_ids)
            context, target = (prompt, (*behind, *y)) if scored else ((*prompt, *behind), y)
            where.append((g, k, scored, len(y)))
            requests.append(ScoreRequest(context, target, law))
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
    groups: Sequence[TraceGroup], law: Law, what: str, prompt: Callable, score: _Scorer, width: int
) -> Tensor:
    """log-probability of every trace under `law` behind `prompt`; [G, K]. A trace that this very law drew keeps
    the sampler's own log-probabilities; an incomplete one that it did not draw stays 0, its evidence being 0."""
    out = torch.zeros(len(groups), width)
    where, requests = [], []
    for g, group in enumerate(groups):
        context = prompt(group.problem)
        for k, trace in enumerate(group.traces):
            own = score.sampled(trace, law, context)
            if own is not None:
                out[g, k] = torch.tensor(own, dtype=torch.float32).sum()
            elif trace.complete:
                where.append((g, k))
                requests.append(ScoreRequest(context, trace.ids, law))
    for (g, k), logps in zip(where, score(requests, what), strict=True):
        out[g, k] = torch.tensor(logps, dtype=torch.float32).sum()
    return out


def _proposal_density(
    groups: Sequence[TraceGroup],
    phase: Phase,
    prompts: PromptBuilder,
    score: _Scorer,
    width: int,
) -> Tensor:
    """log r(z) = logsumexp_c [log(n_c / K) + log r_c(z)] under the laws that sampled; [G, K].

    n_c of the K fresh traces were drawn from r_c: only with the counts themselves, not the shares that they round, is
    the mean over the K traces of f(z) / r(z) an unbiased estimate of sum_z f(z)."""
    components = phase.proposal.components
    if not components:
        return torch.zeros(len(groups), width)
    shares = torch.stack([_dealt_shares(components, group) for group in groups], dim=1)
    terms = []
    for component, share in zip(components, shares, strict=True):
        law = Law(adapter_name(component), *score.law)
        prompt = prompts.hinted_ids if component.prompt == "hinted" else prompts.prior_ids
        logps = _trace_logps(groups, law, component.name, prompt, score, width)
        terms.append(share.log().unsqueeze(1) + logps)
    return torch.logsumexp(torch.stack(terms), dim=0)


def _dealt_shares(components: Sequence[Component], group: TraceGroup) -> Tensor:
    """n_c / K of a group's fresh traces, [C]; a stored chain was dealt to nobody."""
    if len(components) == 1:
        return torch.ones(1)
    fresh = sum(trace.proposal != CHAIN for trace in group.traces)
    return torch.tensor(dealt_counts(components, fresh), dtype=torch.float32) / fresh


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
