"""From a sampled answer to its verdict and its canonical class, one rule for `sample`, `eval` and `rank`."""

from __future__ import annotations

from ..store.record import Judge, Judged
from ..tasks.answers import AnswerKind, canonical
from ..tasks.verifiers import ReadsAnswers, Verifies, verdict_on
from ..types import Completion, Problem


def answer_kind(problem: Problem) -> AnswerKind:
    """What the answers to `problem` are, read off its choices or its reference answer."""
    if problem.metadata.get("choices"):
        return "choice"
    kinds: tuple[AnswerKind, ...] = ("number", "yes_no")
    return next((kind for kind in kinds if canonical(problem.answer, kind) is not None), "text")


def make_judge(verifier: Verifies[Judged], builder: ReadsAnswers) -> Judge:
    """An answer cut off at its cap, or in which nothing can be read, is judged as the empty answer: wrong,
    unparsed and without a class, whatever it says so far."""

    def judge(problem: Problem, answer: Completion) -> tuple[Judged, str | None]:
        verdict = verdict_on(verifier, builder, problem, answer)
        return verdict, canonical(verdict.parsed, answer_kind(problem)) if verdict.parsed else None

    return judge
