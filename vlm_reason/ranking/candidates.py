"""What a ranker sees of one problem, and what it says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..store import SampleRecord

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """N sampled (rationale, answer) pairs of one problem and the A distinct answer strings among them.

    answers     [A]     distinct answer texts
    classes     [A]     canonical class of each; None: it could not be read (such an answer gets no vote)
    chosen      [N]     which answer rationale n gave, -1 for none (it was cut, or no answer was asked)
    logp_answer [N, A]  log p(y_a | x, z_n); -inf for an incomplete rationale. Only `mixture` needs it.
    logp_trace  [N]     log p(z_n | x) summed over tokens
    logp_own    [N]     log p(y_n | x, z_n) of the answer it gave itself
    length      [N]     tokens of z_n and y_n together
    weight      [N]     an outside score of the pair (a reward), >= 0; optional

    Raises UserError when a rationale saw the answer: it predicts nothing. Raises ValueError for shapes that
    disagree.
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
        for name, shape in (
            ("logp_answer", (n, a)),
            ("logp_trace", (n,)),
            ("logp_own", (n,)),
            ("length", (n,)),
            ("weight", (n,)),
        ):
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
            if np.isnan(array).any() or (array == np.inf).any():
                raise ValueError(f"{name} of problem {self.problem_id!r} holds NaN or +inf")

    def need(self, name: str, method: str) -> Array:
        array = getattr(self, name)
        if array is None:
            raise UserError(
                f"{method} needs {name}, which problem {self.problem_id!r} does not have: score it first"
            )
        return array

    def class_of(self, n: int) -> str | None:
        """Canonical class of the answer rationale n gave; None when it gave none that can be read."""
        return None if self.chosen[n] < 0 else self.classes[self.chosen[n]]


@dataclass(frozen=True)
class Ranking:
    """classes: canonical answers, best first, with `posterior` (sums to 1; empty when no answer could be
    read). rationales: indices of the N rationales, best first; `rationale_posterior` belongs to them in that
    order and sums to 1 (all zero when none supports an answer). `abstained` counts rationales without a
    readable answer. Ties are broken by the text of the class and by the index, never by the order of the
    answers."""

    method: str
    classes: tuple[str, ...]
    posterior: tuple[float, ...]
    rationales: tuple[int, ...]
    rationale_posterior: tuple[float, ...]
    abstained: int = 0

    @property
    def answer(self) -> str | None:
        return self.classes[0] if self.classes else None

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "answer": self.answer,
            "answers": [
                {"answer": c, "posterior": p} for c, p in zip(self.classes, self.posterior, strict=True)
            ],
            "rationales": [
                {"index": n, "posterior": p}
                for n, p in zip(self.rationales, self.rationale_posterior, strict=True)
            ],
            "abstained": self.abstained,
        }


def make_ranking(
    method: str, candidates: Candidates, log_class: Mapping[str, float], log_rationale: Sequence[float]
) -> Ranking:
    """Normalise unnormalised log scores of classes and of rationales, and sort both."""
    names = sorted(log_class)
    posterior = dict(zip(names, normalise([log_class[name] for name in names]), strict=True))
    weights = normalise(log_rationale)
    classes = sorted(names, key=lambda name: -posterior[name])
    order = sorted(range(len(weights)), key=lambda n: -weights[n])
    return Ranking(
        method,
        tuple(classes),
        tuple(posterior[name] for name in classes),
        tuple(order),
        tuple(weights[n] for n in order),
        sum(candidates.class_of(n) is None for n in range(len(candidates.chosen))),
    )


def normalise(log_scores: Sequence[float]) -> list[float]:
    """softmax, with -inf for 0; all -inf gives all 0, never NaN."""
    top = max(log_scores, default=-math.inf)
    if top == -math.inf:
        return [0.0] * len(log_scores)
    scores = [math.exp(score - top) for score in log_scores]
    total = math.fsum(scores)
    return [score / total for score in scores]


def candidates_from_records(records: Sequence[SampleRecord]) -> Candidates:
    """The candidates in one problem's stored samples, one a record (M answers behind one trace are M
    candidates).
    `logp_answer` is left out: it takes a model (see `score_matrices`). Records from different weights or
    problems are refused: they are not draws of one law."""
    if not records:
        raise UserError("no samples to rank")
    for name in ("problem_id", "weights"):
        values = sorted({getattr(record, name) for record in records})
        if len(values) > 1:
            raise UserError(f"samples to rank together come from several {name}: {', '.join(values)}")
    answers: dict[str, str | None] = {}
    for record in records:
        if record.answered:
            answers.setdefault(record.answer_text, record.canonical)
    index = {text: i for i, text in enumerate(answers)}
    return Candidates(
        problem_id=records[0].problem_id,
        answers=tuple(answers),
        classes=tuple(answers.values()),
        chosen=tuple(index[r.answer_text] if r.answered else -1 for r in records),
        logp_trace=np.array([math.fsum(r.trace_logps) for r in records]),
        logp_own=np.array([math.fsum(r.answer_logps) if r.answered else -math.inf for r in records]),
        length=np.array([float(len(r.trace_ids) + len(r.answer_ids)) for r in records]),
        saw_answer=tuple(r.saw_answer for r in records),
    )
