"""Evidence: how well a trace explains the reference answer. One function a kind, on plain tensors, in log space.

Each returns log e [G, K]. An incomplete trace has e = 0 (log e = -inf) whatever the kind: it never reached an
answer, and scoring it as if it had would fabricate its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tasks.verifiers import Verdict
from ..types import TraceGroup

NEG_INF = float("-inf")


def accuracy(verdicts: Sequence[Sequence[Sequence[Verdict]]], width: int) -> Tensor:
    """log of the share of right answers among those sampled behind each trace; [G, K].

    verdicts[g][k] are the verdicts of trace k's answers: empty for an incomplete trace. Unbiased for
    pi(Y_x | x, z) whatever M, where Y_x is every string the verifier accepts (Acc of Variational Reasoning,
    arXiv 2509.22637, section 2); quantised to 1/M.
    """
    out = torch.full((len(verdicts), width), NEG_INF)
    for g, group in enumerate(verdicts):
        for k, answers in enumerate(group):
            if answers:
                out[g, k] = torch.tensor(sum(v.score for v in answers) / len(answers)).log()
    return out


def answer_logp(token_logps: Sequence[Sequence[tuple[float, ...]]], width: int) -> Tensor:
    """log pi(y*|x,z) = sum_t log pi(y*_t|.); [G, K]. Exact for one string: biased low for pi(Y_x|x,z) when several
    strings are right. Prefer `accuracy` with a verifier; use this when there is none."""
    return _reduce(token_logps, width, lambda t: t.sum())


def answer_mean_logp(token_logps: Sequence[Sequence[tuple[float, ...]]], width: int) -> Tensor:
    """mean_t log pi(y*_t|.), the geometric-mean likelihood (GML); [G, K]. A heuristic: not a probability of y*."""
    return _reduce(token_logps, width, lambda t: t.mean())


def answer_mean_p(token_logps: Sequence[Sequence[tuple[float, ...]]], width: int) -> Tensor:
    """log mean_t pi(y*_t|.) (RLPR's probability reward); [G, K]."""
    return _reduce(token_logps, width, lambda t: t.exp().mean().log())


def _reduce(token_logps, width: int, reduce) -> Tensor:
    out = torch.full((len(token_logps), width), NEG_INF)
    for g, group in enumerate(token_logps):
        for k, values in enumerate(group):
            if values:
                out[g, k] = reduce(torch.tensor(values, dtype=torch.float32))
    return out


def minus_no_trace(log_mean_p: Tensor, log_mean_p_empty: Tensor) -> Tensor:
    """log max(0, mean_p with z - mean_p without z); [G, K] from [G, K] and [G]."""
    return (log_mean_p.exp() - log_mean_p_empty.exp().unsqueeze(1)).clamp(min=0).log()


def perplexity_rank(mean_logp: Tensor, trace_tokens: Tensor) -> Tensor:
    """log of the rank score in (0, 1] of the length-discounted answer perplexity within the group; [G, K].

    cost = -mean_logp / max(1, 1 + log10 |z|) (NOVER, arXiv 2505.16022); the lowest cost scores 1, the highest
    1/K, ties share the mean of their scores. Incomplete traces score 0.
    """
    cost = -mean_logp / (1 + trace_tokens.clamp(min=1).log10()).clamp(min=1)
    live = torch.isfinite(mean_logp)
    worse = (cost.unsqueeze(1) > cost.unsqueeze(2)).sum(-1)  # how many of the group cost more than k
    tied = (cost.unsqueeze(1) == cost.unsqueeze(2)).sum(-1)
    score = (worse + (tied + 1) / 2) / mean_logp.shape[1]
    return torch.where(live, score, torch.zeros_like(score)).log()


def complete(groups: Sequence[TraceGroup], width: int) -> Tensor:
    """log 1[trace is complete]; [G, K]: the evidence of given (teacher) traces."""
    out = torch.full((len(groups), width), NEG_INF)
    for g, group in enumerate(groups):
        for k, trace in enumerate(group.traces):
            if trace.complete:
                out[g, k] = 0.0
    return out
