"""Plain JSON lines, one problem each:

    {"id": "7", "question": "...", "answer": "420",
     "samples": [{"text": "...", "pred": "420", "correct": true, "reward": 3.5, "finish": "stop"}, ...]}

Only `answer` and `text` are needed. Without `id` it is the hash of the question; without `pred` the answer is read from
the text; without `correct` the canonical forms of `pred` and `answer` are compared. `finish` may be "stop", "eos" or
"length". `temperature` and `top_p` may stand in a sample or in the row. What else there is goes to `extra`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from ...types import Finish
from ..record import SampleRecord
from .source import Answer, BadSample, Source, text_record

ENGINE = "imported recorded"
_ROW = frozenset({"id", "question", "answer", "samples", "temperature", "top_p"})
_SAMPLE = frozenset({"text", "pred", "correct", "reward", "finish", "temperature", "top_p"})


def records_of_line(row: Mapping[str, Any], source: Source) -> list[SampleRecord]:
    question, reference = _text(row.get("question", ""), "question"), _text(row["answer"], "answer")
    if "id" not in row and not question:
        raise BadSample("neither `id` nor `question`")
    problem_id = (
        _text(row["id"], "id")
        if "id" in row
        else hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
    )
    if not isinstance(row["samples"], list):
        raise BadSample(f"`samples` is {type(row['samples']).__name__}, expected a list")
    if not row["samples"]:  # a problem without a sample would leave the denominator unseen
        raise BadSample(f"`samples` of {problem_id!r} is empty, expected one or more")
    for sample in row["samples"]:
        if not isinstance(sample, dict):
            raise BadSample(f"a sample is {type(sample).__name__}, expected an object")
    shared = {name: value for name, value in row.items() if name not in _ROW}
    return [
        text_record(
            source,
            ENGINE,
            problem_id,
            question,
            reference,
            k,
            _answer(sample, row, reference, source),
            {**shared, **{name: value for name, value in sample.items() if name not in _SAMPLE}},
        )
        for k, sample in enumerate(row["samples"])
    ]


def _answer(sample: Mapping[str, Any], row: Mapping[str, Any], reference: str, source: Source) -> Answer:
    reading, text = source.reading, _text(sample["text"], "text")
    predicted = sample["pred"] if "pred" in sample else reading.extract(text)
    predicted = None if predicted is None else _text(predicted, "pred")
    canonical = reading.canonical(predicted) if predicted else None
    correct = sample.get("correct")
    if correct is None:
        gold = reading.canonical(reading.extract(reference) or reference)
        correct = canonical is not None and canonical == gold
    elif correct not in (True, False):
        raise BadSample(f"`correct` is {correct!r}, expected true or false")
    reward, finish = sample.get("reward"), sample.get("finish", "stop")
    if reward is not None and not (isinstance(reward, (int, float)) and math.isfinite(reward)):
        raise BadSample(f"`reward` is {reward!r}, expected a finite number")
    if finish not in get_args(Finish):
        raise BadSample(f"`finish` is {finish!r}, expected one of {', '.join(get_args(Finish))}")
    return Answer(
        text=text,
        answer=predicted or "",
        canonical=canonical,
        correct=bool(correct),
        finish=cast(Finish, finish),
        reward=None if reward is None else float(reward),
        temperature=float(sample.get("temperature", row.get("temperature", 1.0))),
        top_p=float(sample.get("top_p", row.get("top_p", 1.0))),
    )


def _text(value: Any, name: str) -> str:
    """A text, or a number as text: what stands for an answer or an id."""
    if isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return str(value)
    raise BadSample(f"`{name}` is {value!r:.60}, expected a text or a number")
