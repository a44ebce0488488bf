"""Draw z, then y behind it: the one two-stage sampler that training, evaluation and `sample` share.

    z_k ~ r_k(z | prompt_k)                 until the trace closes itself, the text ends, or the cap
    y_km ~ pi(y | x, z_k)                   behind prior prompt + z_k + answer cue, for complete z_k only

The answer is always asked of the reasoning model behind the *prior* prompt, also when the trace was drawn
behind a hint: that is the quantity the evidence needs, and the only one that says how the model will be used.
Ids are concatenated, never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import UserError
from ..types import Completion, Problem, Trace, TraceGroup
from .base import Engine, Law, SampleRequest, StopRule
from .seeds import Stream, counter_seed

REASONER = Law("reasoner")


class Prompts(Protocol):
    """What of a prompt builder sampling needs (vlm_reason.tasks.prompts.PromptBuilder has it)."""

    @property
    def cue_ids(self) -> tuple[int, ...]: ...
    @property
    def trace_stop(self) -> StopRule: ...
    @property
    def answer_stop(self) -> StopRule: ...
    def prior_ids(self, problem: Problem) -> tuple[int, ...]: ...
    def hinted_ids(self, problem: Problem) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Draw:
    """How one trace of a group is drawn. adapter None is the base model; `hinted` shows it the answer.
    `name` is what the trace records as its proposal; traces of one name share one law."""

    name: str = "reasoner/prior"
    adapter: str | None = "reasoner"
    hinted: bool = False
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def law(self) -> Law:
        return Law(self.adapter, self.temperature, self.top_p)


def answer_context(builder: Prompts, problem: Problem, trace_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids behind which an answer to `problem` is sampled or scored: prior prompt, trace, answer cue."""
    return (*builder.prior_ids(problem), *trace_ids, *builder.cue_ids)


def roll_out(
    engine: Engine,
    builder: Prompts,
    problems: Sequence[Problem],
    plan: Sequence[Draw],
    *,
    run_seed: int,
    stream: Stream,
    policy_version: int = 0,
    visit: int | Sequence[int] = 0,
    max_trace_tokens: int,
    max_answer_tokens: int,
    answers_per_trace: int = 1,
    answer_law: Law = REASONER,
    progress: str | None = None,
) -> list[TraceGroup]:
    """K = len(plan) traces a problem, trace k drawn as plan[k], and M = `answers_per_trace` answers behind
    each complete trace (an incomplete one gets none: a cut trace is never scored as if it were whole).

    Seeds: counter_seed(run_seed, stream, policy_version, problem id, visit, k, m), m = 0 for the trace and
    m = 1..M for its answers. `visit` counts how often a problem came by, one number or one a problem; a
    problem twice in one call with the same visit would repeat its samples and is refused.

    Returns one TraceGroup a problem, in order. Raises UserError for K < 1, M < 0 or a cap < 1.
    """
    visits = [visit] * len(problems) if isinstance(visit, int) else list(visit)
    _check(problems, plan, visits, max_trace_tokens, max_answer_tokens, answers_per_trace)

    def seed(problem: int, k: int, m: int) -> int:
        return counter_seed(run_seed, stream, policy_version, problems[problem].id, visits[problem], k, m)

    slots = [(g, k) for g in range(len(problems)) for k in range(len(plan))]
    requests = [
        SampleRequest(
            _prompt(builder, problems[g], plan[k]),
            seed(g, k, 0),
            max_trace_tokens,
            plan[k].law,
            builder.trace_stop,
        )
        for g, k in slots
    ]
    drawn = engine.sample(requests, progress=progress and f"{progress}: traces") if requests else []
    traces = {
        (g, k): Trace(
            problem_id=problems[g].id,
            k=k,
            proposal=plan[k].name,
            prompt_ids=request.prompt_ids,
            completion=completion,
            policy_version=policy_version,
            saw_answer=plan[k].hinted,
        )
        for (g, k), request, completion in zip(slots, requests, drawn, strict=True)
    }

    asked = [(g, k, m) for g, k in slots if traces[g, k].complete for m in range(1, answers_per_trace + 1)]
    answer_requests = [
        SampleRequest(
            answer_context(builder, problems[g], traces[g, k].ids),
            seed(g, k, m),
            max_answer_tokens,
            answer_law,
            builder.answer_stop,
        )
        for g, k, m in asked
    ]
    written = engine.sample(answer_requests, progress=progress and f"{progress}: answers") if asked else []
    answers: dict[tuple[int, int], list[Completion]] = {}
    for (g, k, _), completion in zip(asked, written, strict=True):
        answers.setdefault((g, k), []).append(completion)
    return [
        TraceGroup(
            problem,
            tuple(replace(traces[g, k], answers=tuple(answers.get((g, k), ()))) for k in range(len(plan))),
        )
        for g, problem in enumerate(problems)
    ]


def _prompt(builder: Prompts, problem: Problem, draw: Draw) -> tuple[int, ...]:
    return tuple(builder.hinted_ids(problem) if draw.hinted else builder.prior_ids(problem))


def _check(
    problems: Sequence[Problem],
    plan: Sequence[Draw],
    visits: Sequence[int],
    max_trace_tokens: int,
    max_answer_tokens: int,
    answers_per_trace: int,
) -> None:
    if not plan:
        raise UserError("traces a problem (K) must be >= 1, got 0")
    if answers_per_trace < 0:
        raise UserError(f"answers a trace (M) must be >= 0, got {answers_per_trace}")
    for name, cap in (("max_trace_tokens", max_trace_tokens), ("max_answer_tokens", max_answer_tokens)):
        if cap < 1:
            raise UserError(f"{name} must be >= 1, got {cap}")
    if len(visits) != len(problems):
        raise ValueError(f"{len(visits)} visits for {len(problems)} problems")
    seen: set[tuple[str, int]] = set()
    for problem, count in zip(problems, visits, strict=True):
        if (problem.id, count) in seen:
            raise UserError(f"problem id {problem.id!r} occurs twice in one batch; ids must be unique")
        seen.add((problem.id, count))
