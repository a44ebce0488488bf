"""Are the stored log-probabilities those of the model? Score some samples again, alone in a batch.

    max over tokens t of |log p_stored(t) - log p_batch of 1(t)|

Batches differ from one another by rounding: the order of a sum, a kernel chosen by size. A difference beyond that is
another model, another prompt, a padding or position mistake, or an engine whose probabilities are not those it samples
from. It is measured under the law that sampled (temperature, top-p).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engines.base import Engine, Law, ScoreRequest
from ..store import SampleRecord

ITEMS = 32

TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0, "float16": 0.2}
"""Largest difference of one token, nats, by the dtype of the weights. Measured with the built-in model over 1,500
tokens: 3.7e-5 in float32, 0.36 in bfloat16 (0.017 on average)."""


@dataclass(frozen=True)
class Audit:
    """largest: the largest difference of a token, +inf where the second scoring gives a stored token probability 0.
    mean: the mean absolute difference over `tokens`. worst: key of the sample with the largest."""

    items: int
    tokens: int
    largest: float
    mean: float
    worst: str | None
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.largest <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {
            "items": self.items,
            "tokens": self.tokens,
            "largest": self.largest,
            "mean": self.mean,
            "worst": self.worst,
            "tolerance": self.tolerance,
            "passed": self.passed,
        }


def choose(records: Sequence[SampleRecord], items: int = ITEMS) -> list[SampleRecord]:
    """`items` records, evenly spaced in the order of their keys, which are hashes: the same ones every time, spread
    over problems and members."""
    ordered = sorted(records, key=lambda r: r.key)
    if len(ordered) <= items:
        return ordered
    return [ordered[i * len(ordered) // items] for i in range(items)]


def differences(
    engine: Engine, cue_ids: Sequence[int], record: SampleRecord, adapter: str | None
) -> list[float]:
    """|stored - scored again| of every token of the trace and the answer of one sample, in a batch of one each."""
    law = Law(adapter, record.temperature, record.top_p)
    asked = [(record.prompt_ids, record.trace_ids, record.trace_logps)]
    if record.answer_ids:
        context = (*record.prompt_ids, *record.trace_ids, *cue_ids)
        asked.append((context, record.answer_ids, record.answer_logps))
    found: list[float] = []
    for context, target, before in asked:
        (again,) = engine.score([ScoreRequest(context, target, law)])
        found += [abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(again, before, strict=True)]
    return found


def audit_of(found: Sequence[tuple[str, Sequence[float]]], tolerance: float) -> Audit:
    """(key, differences) of the items -> what to report. Nothing to audit has passed nothing: largest is NaN."""
    values = [d for _, ds in found for d in ds]
    if not values:
        return Audit(len(found), 0, math.nan, math.nan, None, tolerance)
    worst = max(found, key=lambda item: max(item[1], default=0.0))[0]
    return Audit(len(found), len(values), max(values), math.fsum(values) / len(values), worst, tolerance)
