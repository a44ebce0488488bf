"""The bound a latent-variable method optimises, measured on fixed problems, K and seeds.

    L_K = E log (1/K) sum_k w_k,   w_k = pi(y* | x, z_k) for a complete z_k, else 0,   z_k ~ pi(z | x)

The traces come from the prior at temperature 1, so the importance ratio is 1 and w_k is the evidence alone
(IWAE, Burda et al. 2016, arXiv 1509.00519). L_K <= log p(y* | x), and it grows with K, so compare only equal
K. The trace length is capped: p is the probability of closing the trace within the cap and then answering y*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..engines.base import Engine, Law, ScoreRequest
from ..engines.rollout import Draw, Prompts, answer_context, roll_out
from ..errors import UserError
from ..objectives import iwae
from ..stats import clustered, mean_interval
from ..types import Estimate, Problem, TraceGroup

NEG_INF = -math.inf


class AnswerPrompts(Prompts, Protocol):
    """What of a prompt builder scoring a reference answer needs."""

    def answer_ids(self, text: str) -> tuple[int, ...]: ...
    def direct_ids(self, problem: Problem) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class BoundConfig:
    """traces: K. `adapter` None is the base model."""

    traces: int = 8
    max_trace_tokens: int = 64
    adapter: str | None = "reasoner"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.traces < 1:
            raise UserError(f"traces (K) must be >= 1, got {self.traces}")


@dataclass(frozen=True)
class BoundResult:
    """iwae         mean over problems of log (1/K) sum_k w_k. A problem whose K traces were all cut has -inf
    and is
                 left out, counted in `n_dropped` and flagged `infinite`: read `probability` beside it.
    probability  mean over problems of (1/K) sum_k w_k, an unbiased estimate of p(y* | x); always finite
    logp_traced  mean of log p(y* | x, z) over the complete traces, interval over problems
    logp_empty   mean over problems of log p(y* | x, empty z): what the model says without reasoning
    truncated    share of traces of weight 0
    per_problem  problem id -> log (1/K) sum_k w_k, with -inf
    """

    traces: int
    iwae: Estimate
    probability: Estimate
    logp_traced: Estimate
    logp_empty: Estimate
    truncated: float
    per_problem: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "traces": self.traces,
            "iwae": self.iwae.to_json(),
            "probability": self.probability.to_json(),
            "logp_traced": self.logp_traced.to_json(),
            "logp_empty": self.logp_empty.to_json(),
            "truncated": self.truncated,
        }


def bound(
    engine: Engine,
    builder: AnswerPrompts,
    problems: Sequence[Problem],
    config: BoundConfig = BoundConfig(),
    progress: str | None = None,
) -> BoundResult:
    """Draw K traces a problem from the prior and score the reference answer behind each, and behind no trace.
    The seeds depend on `config.seed` and the problem's id, never on how far the weights have been trained."""
    law = Law(config.adapter)
    groups = roll_out(
        engine,
        builder,
        problems,
        [Draw(f"{config.adapter or 'base'}/prior", config.adapter)] * config.traces,
        run_seed=config.seed,
        stream="eval",
        max_trace_tokens=config.max_trace_tokens,
        max_answer_tokens=1,
        answers_per_trace=0,
        progress=progress,
    )
    log_evidence = _evidence(engine, builder, groups, law, progress)
    empty = engine.score(
        [ScoreRequest(builder.direct_ids(p), builder.answer_ids(p.answer), law) for p in problems],
        progress=progress and f"{progress}: empty trace",
    )
    return _result(problems, log_evidence, [math.fsum(logps) for logps in empty])


def _evidence(
    engine: Engine, builder: AnswerPrompts, groups: Sequence[TraceGroup], law: Law, progress: str | None
) -> list[list[float]]:
    """log pi(y* | x, z_k) of every trace, -inf for an incomplete one."""
    where = [(g, trace) for g, group in enumerate(groups) for trace in group.traces if trace.complete]
    requests = [
        ScoreRequest(
            answer_context(builder, groups[g].problem, trace.ids),
            builder.answer_ids(groups[g].problem.answer),
            law,
        )
        for g, trace in where
    ]
    scored = engine.score(requests, progress=progress and f"{progress}: evidence") if requests else []
    evidence = [[NEG_INF] * len(group.traces) for group in groups]
    for (g, trace), logps in zip(where, scored, strict=True):
        evidence[g][trace.k] = math.fsum(logps)
    return evidence


def _result(problems: Sequence[Problem], log_evidence: list[list[float]], empty: list[float]) -> BoundResult:
    values: list[float] = []
    if log_evidence:
        values = iwae(torch.tensor(log_evidence, dtype=torch.float64)).tolist()
    estimate = mean_interval(values, on_invalid="drop")
    if estimate.n_dropped:
        estimate = Estimate(**{**vars(estimate), "flags": (*estimate.flags, "infinite")})
    traced = [(p.id, v) for p, row in zip(problems, log_evidence, strict=True) for v in row if v > NEG_INF]
    total = sum(map(len, log_evidence))
    return BoundResult(
        traces=len(log_evidence[0]) if log_evidence else 0,
        iwae=estimate,
        probability=mean_interval([math.exp(v) for v in values]),
        logp_traced=clustered([v for _, v in traced], [name for name, _ in traced]),
        logp_empty=mean_interval(empty),
        truncated=1 - len(traced) / total if total else math.nan,
        per_problem={p.id: v for p, v in zip(problems, values, strict=True)},
    )
