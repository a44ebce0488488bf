"""From a sampled answer to its verdict and its canonical class, one rule for `sample`, `eval` and `rank`."""

from __future__ import annotations

from typing import Protocol

from ..store.record import Judge, Judged
from ..tasks.answers import AnswerKind, canonical
from ..types import Completion, Problem


class Verifies(Protocol):
    """A verifier (see vlm_reason.tasks.verifiers)."""

    def verify(self, problem: Problem, answer_text: str) -> Judged: ...


class ReadsAnswers(Protocol):
    """What of a prompt builder judging needs."""

    def parse_answer(self, completion_text: str) -> str | None: ...


def answer_kind(problem: Problem) -> AnswerKind:
    """What the answers to `problem` are, read off its choices or its reference answer."""
    if problem.metadata.get("choices"):
        return "choice"
    kinds: tuple[AnswerKind, ...] = ("number", "yes_no")
    return next((kind for kind in kinds if canonical(problem.answer, kind) is not None), "text")


def make_judge(verifier: Verifies, builder: ReadsAnswers) -> Judge:
    """An answer cut off at its cap, or in which nothing can be read, is judged as the empty answer: wrong,
    unparsed and without a class, whatever it says so far."""

    def judge(problem: Problem, answer: Completion) -> tuple[Judged, str | None]:
        text = builder.parse_answer(answer.text) if answer.complete else None
        verdict = verifier.verify(problem, text or "")
        return verdict, canonical(verdict.parsed, answer_kind(problem)) if verdict.parsed else None

    return judge
