"""What a ranker sees of one problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from ..errors import UserError
from ..store import SampleRecord, check_one_setting

Array = NDArray[np.float64]

_HOW: Mapping[str, str] = MappingProxyType(
    {
        "logq": "the density that drew the rationales: samples with token ids, drawn at temperature > 0, have it",
        "reward": "samples with the field `reward` have it; a checker's verdict saw the reference and is none",
        "steps": "samples with the field `step_rewards`, a list a sample, have it",
    }
)


@dataclass(frozen=True)
class Candidates:
    """N sampled (rationale, answer) pairs of one problem and the A distinct answer strings among them.

    answers     [A]     distinct answer texts
    classes     [A]     canonical class of each; None: it could not be read (such an answer gets no vote)
    chosen      [N]     which answer rationale n gave, -1 for none (it was cut, or no answer was asked)
    logp_answer [N, A]  log p(y_a | x, z_n); -inf for an incomplete rationale
    logp_trace  [N]     log p(z_n | x) under the model that ranks, at temperature 1
    logq        [N]     log q(z_n | x) under the law that drew z_n
    logp_own    [N]     log p(y_n | x, z_n) of the answer it gave itself
    length      [N]     tokens of z_n and y_n together
    trace_length [N], answer_length [A]   tokens of each alone
    weight      [N]     a vote's weight given from outside, >= 0
    reward      [N]     a reward model's score of the pair, any real number
    steps       [N]     a process reward model's scores of the steps of z_n, each in [0, 1]
    draw        [N]     which draw a rationale is: equal numbers are one rationale with several answers behind it, and
                        not independent; absent: each its own

    log-probabilities in nats, summed over tokens; every array is optional, and a method says what it lacks. Raises
    UserError when a rationale saw the answer: it predicts nothing. Raises ValueError for shapes that disagree.
    """

    problem_id: str
    answers: tuple[str, ...]
    classes: tuple[str | None, ...]
    chosen: tuple[int, ...]
    logp_answer: Array | None = None
    logp_trace: Array | None = None
    logp_own: Array | None = None
    length: Array | None = None
    weight: Array | None = None
    saw_answer: tuple[bool, ...] = ()
    logq: Array | None = None
    trace_length: Array | None = None
    answer_length: Array | None = None
    reward: Array | None = None
    steps: tuple[tuple[float, ...], ...] | None = None
    draw: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n, a = len(self.chosen), len(self.answers)
        if any(self.saw_answer):
            raise UserError(
                f"problem {self.problem_id!r}: {sum(self.saw_answer)} of {n} rationales were drawn behind the answer; "
                "ranking them would only repeat it. Sample from the prior prompt"
            )
        if len(self.classes) != a or len(set(self.answers)) != a:
            raise ValueError(
                f"{a} answers (distinct: {len(set(self.answers))}) but {len(self.classes)} classes"
            )
        if any(not -1 <= index < a for index in self.chosen):
            raise ValueError(f"chosen {self.chosen} must index {a} answers, or be -1")
        if len(self.draw) not in (0, n) or (self.steps is not None and len(self.steps) != n):
            raise ValueError(f"draw and steps have one entry for each of {n} rationales")
        for name, shape in _shapes(n, a).items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
            if np.isnan(array).any() or (array == np.inf).any():
                raise ValueError(f"{name} of problem {self.problem_id!r} holds NaN or +inf")
        if self.logq is not None and (self.logq == -np.inf).any():
            raise ValueError(f"logq of problem {self.problem_id!r} is -inf for a rationale that q drew")

    def need(self, name: str, method: str) -> Array:
        """The field; UserError where it is absent."""
        array = getattr(self, name)
        if array is None:
            raise UserError(
                f"{method} needs {name}, which problem {self.problem_id!r} does not have: "
                f"{_HOW.get(name, 'score it first')}"
            )
        return array

    def class_of(self, n: int) -> str | None:
        """Canonical class of the answer rationale n gave; None when it gave none that can be read."""
        return None if self.chosen[n] < 0 else self.classes[self.chosen[n]]

    @cached_property
    def columns(self) -> dict[str, list[int]]:
        """The answers of each class, classes in order of their text."""
        members: dict[str, list[int]] = {}
        for a, name in enumerate(self.classes):
            if name is not None:
                members.setdefault(name, []).append(a)
        return dict(sorted(members.items()))

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """[N] number of the independent draw that each rationale belongs to, 0..G-1."""
        n = len(self.chosen)
        return np.arange(n) if not self.draw else np.unique(self.draw, return_inverse=True)[1]

    @cached_property
    def log_share(self) -> Array:
        """[N] -log of how many candidates hold the same draw: a rationale counts once, however many answers were
        asked behind it."""
        return -np.log(np.bincount(self.clusters)[self.clusters])

    def pool(self, log_scores: Array) -> Array:
        """[N, A] scores of strings -> [N, C] log of their sum in each class, in the order of `columns`."""
        if not self.columns:
            return np.empty((len(log_scores), 0))
        pooled = [logsumexp(log_scores[:, own], axis=1) for own in self.columns.values()]
        return np.stack(pooled, axis=1)


def _shapes(n: int, a: int) -> dict[str, tuple[int, ...]]:
    row = ("logp_trace", "logp_own", "length", "weight", "logq", "trace_length", "reward")
    return {"logp_answer": (n, a), "answer_length": (a,), **{name: (n,) for name in row}}


def candidates_from_records(records: Sequence[SampleRecord]) -> Candidates:
    """The candidates in one problem's stored samples, one a record (M answers behind one trace are M candidates of one
    draw).

    `logp_answer` is left out: it takes a model (`score_candidates`). So is `logp_trace` of samples drawn at another
    temperature than 1 or with top-p: what is stored is then log q. Of greedy samples there is no log q. Records from
    different weights or problems, or at several temperatures or top_p, are refused: they are not draws of one law. So
    is a trace that was drawn under two settings.
    """
    if not records:
        raise UserError("no samples to rank")
    for name in ("problem_id", "weights", "temperature", "top_p"):
        values = sorted({getattr(record, name) for record in records})
        if len(values) > 1:
            raise UserError(
                f"samples to rank together come from several {name}: {', '.join(map(str, values))}"
            )
    check_one_setting(records)
    answers: dict[str, SampleRecord] = {}
    for record in records:
        if record.answered:
            answers.setdefault(record.answer_text, record)
    index = {text: i for i, text in enumerate(answers)}
    draws = {key: i for i, key in enumerate(dict.fromkeys(map(_draw_key, records)))}
    return Candidates(
        problem_id=records[0].problem_id,
        answers=tuple(answers),
        classes=tuple(record.canonical for record in answers.values()),
        chosen=tuple(index[r.answer_text] if r.answered else -1 for r in records),
        saw_answer=tuple(r.saw_answer for r in records),
        draw=tuple(draws[_draw_key(r)] for r in records),
        reward=_rewards(records),
        steps=_steps(records),
        **_from_tokens(records, list(answers.values())),
    )


def _draw_key(record: SampleRecord) -> tuple[int | None, int, int]:
    return (record.member, record.k, record.seed)


def _from_tokens(records: Sequence[SampleRecord], answers: Sequence[SampleRecord]) -> dict[str, Array | None]:
    """What needs token ids; nothing for samples that were stored as text alone."""
    if not all(r.trace_ids and (r.answer_ids or not r.answered) for r in records):
        return {}
    plain = all(r.temperature in (0, 1) and r.top_p == 1 for r in records)
    drawn = all(r.temperature > 0 for r in records)
    trace = np.array([math.fsum(r.trace_logps) for r in records])
    own = np.array([math.fsum(r.answer_logps) if r.answered else -math.inf for r in records])
    return {
        "logp_trace": trace if plain else None,
        "logq": trace if drawn else None,
        "logp_own": own if plain else None,
        "length": np.array([float(len(r.trace_ids) + len(r.answer_ids)) for r in records]),
        "trace_length": np.array([float(len(r.trace_ids)) for r in records]),
        "answer_length": np.array([float(len(r.answer_ids)) for r in answers]),
    }


def _rewards(records: Sequence[SampleRecord]) -> Array | None:
    """Of every sample or of none. Never `score`: that is the checker's verdict, which compared the answer with the
    reference, and ranking by it would be looking it up."""
    values = [r.reward for r in records if r.reward is not None]
    return np.array(values) if len(values) == len(records) else None


def _steps(records: Sequence[SampleRecord]) -> tuple[tuple[float, ...], ...] | None:
    values = [r.extra.get("step_rewards") for r in records]
    if not all(isinstance(v, list | tuple) and v for v in values):
        return None
    return tuple(tuple(map(float, v)) for v in values)  # type: ignore[arg-type]
