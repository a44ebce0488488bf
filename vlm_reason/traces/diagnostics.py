"""What a window says about itself: the numbers that show a bound moving, weights collapsing, or a hint leaking."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..objectives import effective_sample_size, iwae
from ..tasks.steps import answer_copied, check_steps
from ..types import Coefficients, TraceGroup
from .measure import Measured
from .replay import CHAIN

Metrics = dict[str, float | int | None]


def window_metrics(
    groups: Sequence[TraceGroup], measured: Measured, coefficients: Coefficients, alive: Sequence[bool]
) -> Metrics:
    """One number each; None where the window cannot say (no prior draws, say). A stored chain is no fresh draw: it
    is left out of the bound, of unhinted_accuracy and of the tokens generated.

    bound              mean over groups of log (1/K) sum_k e_k pi(z_k)/r(z_k), over groups where it is finite (the
                       share where it is not is bound_null); an estimate of IWAE-K under this evidence. None where
                       the ratio was neither measured nor 1
    ess                mean effective sample size of the trained weights |c_z| (or |c_q|), of K
    null_rate          share of groups that train on nothing
    weight_length_corr Pearson correlation of weight and trace length, pooled
    answer_copied      share of traces drawn behind a hint that state the reference answer without deriving it
    steps_right        share of complete traces whose written equations all hold, of those that have any
    accuracy           share of right answers behind all traces (their probability, where the reference answer is
                       scored and none is sampled); an incomplete trace is wrong
    unhinted_accuracy  the same behind traces of the prior alone
    tokens/reused      log-probabilities taken from the sampler, where a scoring pass would have given the same
    mismatch/*         sampler against scorer (mismatch.py), over the traces that were scored again to compare them
    """
    traces = [t for group in groups for t in group.traces]
    scores = measured.scores
    fresh = scores.mask if scores.chain is None else scores.mask & ~scores.chain
    bound, bound_null = None, None
    if measured.ratio_known:
        bound, bound_null = _bound(scores.log_evidence + scores.logp_prior - scores.logq, fresh)
    weights = coefficients.c_z if coefficients.c_z is not None else coefficients.c_q
    ess, correlation = (None, None) if weights is None else _weights(weights, scores.length, scores.mask)
    hinted = [
        (g.problem.answer, t) for g in groups for t in g.traces if t.saw_answer and t.proposal != "dataset"
    ]
    checked = [check_steps(t.completion.text) for t in traces if t.complete]
    checked = [c for c in checked if c.n_equations]
    right = [
        (t.saw_answer or t.proposal == CHAIN, value)
        for group, values in zip(groups, measured.right or (), strict=False)
        for t, value in zip(group.traces, values, strict=True)
    ]
    return {
        "bound": bound,
        "bound_null": bound_null,
        "ess": ess,
        "null_rate": _mean([not a for a in alive]),
        "weight_length_corr": correlation,
        "answer_copied": _mean([answer_copied(t.completion.text, answer) for answer, t in hinted]),
        "steps_right": _mean([c.all_right for c in checked]),
        "accuracy": _mean([value for _, value in right]),
        "unhinted_accuracy": _mean([value for excluded, value in right if not excluded]),
        "truncated": _mean([not t.complete for t in traces]),
        "unverifiable": sum(v.failed for group in measured.verdicts for ks in group for v in ks),
        "trace_tokens": _mean([len(t.ids) for t in traces]),
        "tokens/scored": measured.scored_tokens,
        "tokens/reused": measured.reused_tokens,
        **measured.mismatch.metrics(),
        "traces": len(traces),
        "distinct_traces": len({(t.problem_id, t.ids) for t in traces}),
    }


def generated_tokens(groups: Sequence[TraceGroup]) -> int:
    """Tokens that sampling this window wrote: traces and answers, not given traces and not stored chains."""
    return sum(
        len(t.ids) + sum(len(a.ids) for a in t.answers)
        for group in groups
        for t in group.traces
        if t.proposal not in ("dataset", CHAIN)
    )


def _mean(values: Sequence[float | bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _bound(logw: Tensor, mask: Tensor) -> tuple[float | None, float]:
    values = iwae(logw.masked_fill(~mask, -math.inf), mask)
    finite = values[torch.isfinite(values)]
    return (float(finite.mean()) if len(finite) else None), 1 - len(finite) / max(len(values), 1)


def _weights(weights: Tensor, length: Tensor, mask: Tensor) -> tuple[float | None, float | None]:
    per_trace = (weights if weights.ndim == 2 else weights.sum(-1)).abs()
    live = per_trace.sum(1) > 0
    ess = effective_sample_size(per_trace[live].log(), mask[live]).mean() if bool(live.any()) else None
    w, n = per_trace[mask], length[mask]
    if len(w) < 2 or float(w.std()) == 0 or float(n.std()) == 0:
        return (None if ess is None else float(ess)), None
    return (None if ess is None else float(ess)), float(torch.corrcoef(torch.stack([w, n]))[0, 1])
