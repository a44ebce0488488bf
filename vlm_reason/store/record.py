"""One stored sample: a trace, at most one answer behind it, and everything needed to say where they came
from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..types import Completion, Finish, Problem, Trace, TraceGroup

JSON = str | int | float | bool | None | list[Any] | dict[str, Any]


def sample_key(
    *,
    weights: str,
    engine: str,
    prompt_ids: Sequence[int],
    parameters: Mapping[str, JSON],
    seed: int,
    k: int,
    m: int,
) -> str:
    """Content address of a sample, 32 hex digits of blake2b: equal exactly when the same draw would be
    repeated.

    weights     hash of everything that changes the model (base, adapter, member)
    engine      name and version of what sampled
    parameters  temperature, top_p, caps, stop rules, answer cue: whatever else shapes the text
    seed, k, m  the counter seed and the position in the group
    """
    content = [weights, engine, list(map(int, prompt_ids)), dict(parameters), seed, k, m]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class SampleRecord:
    """Trace k of a problem and answer m behind it (m >= 1; m = 0 and no answer ids: the trace was incomplete,
    or no answer was asked for). With M answers the trace is repeated in M records.

    *_logps are per token, in nats, under the law that sampled them (temperature and top_p applied). `weights`
    and `engine` as in `sample_key`; `member` numbers the draw of a weight posterior. `correct`, `score`,
    `parsed`, `failed` are the verifier's verdict, None where it was not asked; `canonical` is the answer's
    class, None where it could not be read. `reward` is an outside score of the sample (a reward model's), any
    real number.

    text_only: taken over from a file that kept no token ids and no log-probabilities. They are unknown then, not
    empty: ids and log-probabilities must be (), and nothing may be computed from them. `finish` is "stop" where the
    file did not say.

    `extra` keeps fields a newer version wrote, and what only some tasks have. Names with a meaning here:
        choice_logps  log p(choice | x), nats, of each of the K options that were scored (K differs between items)
        choice_gold   index of the right option
    """

    key: str
    problem_id: str
    question: str
    reference: str
    prompt_ids: tuple[int, ...]
    trace_ids: tuple[int, ...]
    trace_text: str
    trace_logps: tuple[float, ...]
    finish: Finish
    seed: int
    temperature: float
    top_p: float
    proposal: str
    saw_answer: bool
    weights: str
    engine: str
    k: int
    m: int = 0
    member: int | None = None
    policy_version: int = 0
    answer_ids: tuple[int, ...] = ()
    answer_text: str = ""
    answer_logps: tuple[float, ...] = ()
    answer_finish: Finish | None = None
    answer_seed: int | None = None
    correct: bool | None = None
    score: float | None = None
    parsed: str | None = None
    failed: bool | None = None
    canonical: str | None = None
    reward: float | None = None
    text_only: bool = False
    extra: Mapping[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("trace", "answer"):
            ids, logps = getattr(self, f"{name}_ids"), getattr(self, f"{name}_logps")
            if len(ids) != len(logps):
                raise ValueError(f"{len(ids)} {name} ids but {len(logps)} log-probabilities")
            if not all(map(math.isfinite, logps)):
                raise ValueError(f"{self.problem_id}: {name} log-probability {logps} is not finite")
            if self.text_only and ids:
                raise ValueError(f"{self.problem_id}: a text-only sample with {len(ids)} {name} ids")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"{self.problem_id}: reward {self.reward} is not finite")

    @property
    def complete(self) -> bool:
        return self.finish == "stop"

    @property
    def answered(self) -> bool:
        return self.m > 0

    def to_json(self) -> dict[str, Any]:
        """One flat object, `key` first; `extra` is spread among the fields."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**data, **{name: value for name, value in self.extra.items() if name not in data}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SampleRecord:
        """The inverse. Fields this version does not know are kept in `extra`; a missing one raises
        KeyError."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        missing = [name for name in _REQUIRED if name not in data]
        if missing:
            raise KeyError(missing[0])
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data.items()
            if name in known
        }
        return cls(**values, extra={name: value for name, value in data.items() if name not in known})


_REQUIRED = tuple(
    f.name
    for f in dataclasses.fields(SampleRecord)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
)


class Judged(Protocol):
    """A verifier's verdict, as far as it is stored."""

    @property
    def correct(self) -> bool: ...
    @property
    def score(self) -> float: ...
    @property
    def parsed(self) -> str | None: ...
    @property
    def failed(self) -> bool: ...


Judge = Callable[[Problem, Completion], tuple[Judged, str | None]]
"""The verdict on an answer, and its canonical form (None: it cannot be read)."""


@dataclass(frozen=True)
class Provenance:
    """What all samples of one call share. `parameters` is everything of the sampling that is not a field
    here."""

    weights: str
    engine: str
    temperature: float
    top_p: float = 1.0
    member: int | None = None
    parameters: Mapping[str, JSON] = field(default_factory=dict)

    def key(self, prompt_ids: Sequence[int], seed: int, k: int, m: int) -> str:
        parameters = {**self.parameters, "temperature": self.temperature, "top_p": self.top_p}
        return sample_key(
            weights=self.weights,
            engine=self.engine,
            prompt_ids=prompt_ids,
            parameters={**parameters, "member": self.member},
            seed=seed,
            k=k,
            m=m,
        )


def records_of(
    group: TraceGroup,
    provenance: Provenance,
    judge: Judge | None = None,
) -> list[SampleRecord]:
    """The records of one group, in order of (k, m). Without a judge the verdict fields stay None."""
    records = []
    for trace in group.traces:
        if not trace.answers:
            records.append(_record(group, trace, provenance, 0))
        for m, answer in enumerate(trace.answers, start=1):
            record = _record(group, trace, provenance, m)
            records.append(_with_answer(record, group.problem, answer, judge))
    return records


def _record(group: TraceGroup, trace: Trace, provenance: Provenance, m: int) -> SampleRecord:
    completion = trace.completion
    return SampleRecord(
        key=provenance.key(trace.prompt_ids, completion.seed, trace.k, m),
        problem_id=group.problem.id,
        question=group.problem.question,
        reference=group.problem.answer,
        prompt_ids=trace.prompt_ids,
        trace_ids=completion.ids,
        trace_text=completion.text,
        trace_logps=completion.logps,
        finish=completion.finish,
        seed=completion.seed,
        temperature=provenance.temperature,
        top_p=provenance.top_p,
        proposal=trace.proposal,
        saw_answer=trace.saw_answer,
        weights=provenance.weights,
        engine=provenance.engine,
        k=trace.k,
        m=m,
        member=provenance.member,
        policy_version=trace.policy_version,
    )


def _with_answer(
    record: SampleRecord, problem: Problem, answer: Completion, judge: Judge | None
) -> SampleRecord:
    record = dataclasses.replace(
        record,
        answer_ids=answer.ids,
        answer_text=answer.text,
        answer_logps=answer.logps,
        answer_finish=answer.finish,
        answer_seed=answer.seed,
    )
    if judge is None:
        return record
    verdict, canonical = judge(problem, answer)
    return dataclasses.replace(
        record,
        correct=verdict.correct,
        score=verdict.score,
        parsed=verdict.parsed,
        failed=verdict.failed,
        canonical=canonical,
    )
