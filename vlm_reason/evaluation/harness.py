"""Accuracy of a model on a set of problems: draw samples, judge them, and summarise the records.

`summarise` needs the records alone, so the same numbers come from a store long after the model is gone. The
denominator is fixed: a trace that was cut, an answer that was cut or cannot be read, is wrong and is counted
by name.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engines.base import Engine, Law
from ..engines.rollout import Draw, Prompts, roll_out
from ..errors import UserError
from ..stats import PairedEstimate, clustered, paired_difference
from ..store import Judge, Provenance, SampleRecord, check_one_setting, records_of
from ..types import Estimate, Problem, Trace
from .metrics import accuracy, pass_at_k

TraceKey = tuple[str, str, int | None, int, int]
"""Problem id, weights, member, k, seed: a store may hold draws of several run seeds, and imported ones have no seed."""


@dataclass(frozen=True)
class EvalConfig:
    """traces (K) a problem and answers (M) behind each; temperature 0 is greedy, and then more than one of
    either would be the same text again. `adapter` None is the base model. Seeds depend on `seed` and the
    problem's id alone, so two models are compared on common random numbers."""

    traces: int = 1
    answers: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_trace_tokens: int = 64
    max_answer_tokens: int = 16
    adapter: str | None = "reasoner"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("traces", "answers", "max_trace_tokens", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be a number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.temperature == 0 and self.traces * self.answers > 1:
            raise UserError(
                f"greedy decoding (temperature 0) gives one text: traces={self.traces} and answers={self.answers} "
                "would repeat it; set a temperature or draw one"
            )


@dataclass(frozen=True)
class EvalResult:
    """accuracy     share of right answers, interval over problems
    unparsed     share of samples without a readable answer among traces that were complete
    truncated    share of traces that never closed (cut at the cap, or the text ended inside them)
    trace_length mean tokens of a trace
    pass_at      k -> pass@k, for powers of two up to the samples of a problem (empty with one)
    per_problem  problem id -> mean correctness, for paired comparison
    tokens, seconds  drawn and taken; 0 when the records came from a store
    """

    problems: int
    accuracy: Estimate
    unparsed: Estimate
    truncated: Estimate
    trace_length: Estimate
    pass_at: Mapping[int, Estimate] = field(default_factory=dict)
    per_problem: Mapping[str, float] = field(default_factory=dict)
    verifier_failures: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds > 0 else None

    def rows(self) -> dict[str, Estimate]:
        """The numbers by the names that requirements use."""
        return {
            "accuracy": self.accuracy,
            "unparsed": self.unparsed,
            "truncated": self.truncated,
            "trace_tokens": self.trace_length,
            **{f"pass@{k}": estimate for k, estimate in self.pass_at.items()},
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "problems": self.problems,
            "accuracy": self.accuracy.to_json(),
            "unparsed": self.unparsed.to_json(),
            "truncated": self.truncated.to_json(),
            "trace_length": self.trace_length.to_json(),
            "pass_at": {str(k): estimate.to_json() for k, estimate in self.pass_at.items()},
            "verifier_failures": self.verifier_failures,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def evaluate(
    engine: Engine,
    builder: Prompts,
    problems: Sequence[Problem],
    judge: Judge,
    config: EvalConfig = EvalConfig(),
    progress: str | None = None,
) -> EvalResult:
    """Draw, judge and summarise, without keeping the samples. `judge` comes from `make_judge(verifier,
    builder)`."""
    started = time.perf_counter()
    provenance = Provenance("unnamed", "unnamed", config.temperature, config.top_p)
    records = draw(engine, builder, problems, judge, config, provenance, progress)
    return summarise(records, seconds=time.perf_counter() - started)


def draw(
    engine: Engine,
    builder: Prompts,
    problems: Sequence[Problem],
    judge: Judge | None,
    config: EvalConfig,
    provenance: Provenance,
    progress: str | None = None,
) -> list[SampleRecord]:
    """The judged records of `config.traces` x `config.answers` samples a problem, drawn from the prior
    prompt. Members of a posterior draw with seeds of their own. UserError for a log-probability that is not a
    number: nothing of such a model is kept."""
    name = "base/prior" if config.adapter is None else "reasoner/prior"
    plan = [Draw(name, config.adapter, False, config.temperature, config.top_p)] * config.traces
    groups = roll_out(
        engine,
        builder,
        problems,
        plan,
        run_seed=config.seed,
        stream="eval",
        visit=visit_of(provenance),
        max_trace_tokens=config.max_trace_tokens,
        max_answer_tokens=config.max_answer_tokens,
        answers_per_trace=config.answers,
        answer_law=Law(config.adapter, config.temperature, config.top_p),
        progress=progress,
    )
    for group in groups:
        for trace in group.traces:
            _check_finite(trace, provenance.weights)
    return [record for group in groups for record in records_of(group, provenance, judge)]


def visit_of(provenance: Provenance) -> int:
    """The `visit` in the seeds of an evaluation: the member, so that members draw independently."""
    return provenance.member or 0


def _check_finite(trace: Trace, weights: str) -> None:
    for completion in (trace.completion, *trace.answers):
        if not all(map(math.isfinite, completion.logps)):
            raise UserError(
                f"weights {weights} gave problem {trace.problem_id!r} a log-probability that is not finite: "
                "the weights hold NaN, or its dtype overflows (float16); nothing was stored. Mend the weights or use "
                "dtype bfloat16 or float32"
            )


def summarise(
    records: Sequence[SampleRecord], seconds: float = 0.0, members: bool = False, undrawn: Sequence[str] = ()
) -> EvalResult:
    """The result of judged records of one model, or with `members` of an equal mixture of several. A cut trace
    counts as one wrong sample for each answer it did not get, so that it weighs as much as any other trace.
    undrawn: problems that could not be asked, which have as many traces as the others, all wrong.
    UserError for records without verdicts, for a trace drawn under two settings, and for records of several models,
    unless with `members` they are one for each member."""
    _check_one_model(records, members)
    _check_judged(records)
    check_one_setting(records)
    traces: dict[TraceKey, list[SampleRecord]] = {}
    for record in records:
        key = (record.problem_id, record.weights, record.member, record.k, record.seed)
        traces.setdefault(key, []).append(record)
    items = [key[0] for key in traces]
    right = [sum(bool(r.correct) for r in group) / len(group) for group in traces.values()]
    each = max(Counter(items).values(), default=1)
    judged = items + [problem for problem in undrawn for _ in range(each)]
    right += [0.0] * (each * len(undrawn))
    asked = [(key[0], r) for key, group in traces.items() for r in group if r.answered]
    per_problem = _mean_by_item(judged, right)
    firsts = [group[0] for group in traces.values()]
    return EvalResult(
        problems=len(per_problem),
        accuracy=accuracy(right, judged),
        unparsed=_share([r.canonical is None for _, r in asked], [problem for problem, _ in asked]),
        truncated=_share([not r.complete for r in firsts], items),
        trace_length=clustered([float(len(r.trace_ids)) for r in firsts], items),
        pass_at=_pass_at(traces, dict.fromkeys(undrawn, each)),
        per_problem=per_problem,
        verifier_failures=sum(bool(r.failed) for _, r in asked),
        tokens=sum(len(r.trace_ids) for r in firsts) + sum(len(r.answer_ids) for _, r in asked),
        seconds=seconds,
    )


def compare(a: EvalResult, b: EvalResult) -> PairedEstimate:
    """Accuracy of a minus accuracy of b, paired on problem ids. UserError when the problems differ."""
    return paired_difference(a.per_problem, b.per_problem)


def _check_one_model(records: Sequence[SampleRecord], members: bool) -> None:
    models = models_of(records)
    if len(models) > 1 and not (members and are_members(models)):
        listed = ", ".join(w if m is None else f"{w} member {m}" for m, w in models)
        raise UserError(f"records of {len(models)} models ({listed}) cannot be one accuracy: choose one")


def models_of(records: Sequence[SampleRecord]) -> list[tuple[int | None, str]]:
    """The (member, weights) that drew the records, in order of weights."""
    return sorted({(r.member, r.weights) for r in records}, key=lambda model: (model[1], str(model[0])))


def are_members(models: Sequence[tuple[int | None, str]]) -> bool:
    """Are several models one posterior: each a member, under a number of its own?"""
    numbers = {member for member, _ in models}
    return None not in numbers and len(numbers) == len(models)


def _check_judged(records: Sequence[SampleRecord]) -> None:
    unjudged = next((r for r in records if r.answered and r.correct is None), None)
    if unjudged is not None:
        raise UserError(
            f"the sample of problem {unjudged.problem_id!r} was stored without a verdict; judge it first"
        )


def _mean_by_item(items: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for item, value in zip(items, values, strict=True):
        groups.setdefault(item, []).append(value)
    return {item: sum(group) / len(group) for item, group in groups.items()}


def _share(flags: Sequence[bool], items: Sequence[str]) -> Estimate:
    return accuracy([float(flag) for flag in flags], items)


def _pass_at(
    traces: Mapping[TraceKey, Sequence[SampleRecord]], undrawn: Mapping[str, int]
) -> dict[int, Estimate]:
    """pass@k over traces, the first answer of each: draws behind one trace are not independent draws of the
    model. undrawn: problem -> traces it would have had, all wrong."""
    n: dict[str, int] = dict(undrawn)
    right: dict[str, int] = dict.fromkeys(undrawn, 0)
    for (problem, *_), group in traces.items():
        n[problem] = n.get(problem, 0) + 1
        right[problem] = right.get(problem, 0) + bool(group[0].correct)
    most = max(n.values(), default=0)
    sizes = [k for k in (1 << i for i in range(most.bit_length())) if 1 < k <= most]
    return {k: pass_at_k(list(right.values()), list(n.values()), k) for k in sizes}
