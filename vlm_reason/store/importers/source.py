"""What all formats share: where a sample comes from, and the record of a sample of which only the text is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...types import Finish
from ..record import SampleRecord


class BadSample(ValueError):
    """What is wrong with a line."""


@dataclass(frozen=True)
class Reading:
    """extract: the answer in a whole text, None if there is none. canonical: the class of an answer, None if it cannot
    be read."""

    extract: Callable[[str], str | None]
    canonical: Callable[[str], str | None]


@dataclass(frozen=True)
class Source:
    path: Path
    content: str
    system: str
    member: int | None
    reading: Reading
    filter: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a file says of one sample. canonical None: it could not be read. score in [0, 1]. failed: no verdict."""

    text: str
    answer: str
    canonical: str | None
    correct: bool | None
    score: float | None = None
    failed: bool = False
    finish: Finish = "stop"
    reward: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0


def text_record(
    source: Source,
    engine: str,
    problem_id: str,
    question: str,
    reference: str,
    k: int,
    answer: Answer,
    extra: Mapping[str, Any],
) -> SampleRecord:
    """A text-only record. An answer that cannot be read is wrong whatever the file says."""
    correct = answer.correct if answer.canonical is not None or answer.correct is None else False
    content = [
        source.system,
        source.member,
        engine,
        problem_id,
        question,
        reference,
        k,
        vars(answer),
        dict(extra),
    ]
    text = json.dumps(content, sort_keys=True)
    return SampleRecord(
        key=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        problem_id=problem_id,
        question=question,
        reference=reference,
        prompt_ids=(),
        trace_ids=(),
        trace_text=answer.text,
        trace_logps=(),
        finish=answer.finish,
        seed=0,
        temperature=answer.temperature,
        top_p=answer.top_p,
        proposal="imported",
        saw_answer=False,
        weights=source.system,
        engine=engine,
        k=k,
        m=1,
        member=source.member,
        answer_text=answer.answer,
        answer_finish=answer.finish,
        correct=correct,
        score=float(bool(correct)) if answer.score is None and correct is not None else answer.score,
        parsed=answer.answer if answer.canonical is not None else None,
        failed=answer.failed,
        canonical=answer.canonical,
        reward=answer.reward,
        text_only=True,
        extra=extra,
    )
