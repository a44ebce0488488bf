"""The rows of a result: what the samples of one task say, each number with its interval.

    of the samples    accuracy, unparsed, truncated, trace_tokens, pass@k
    of the answer that the ranker chose from several samples    answer_accuracy, and of its confidence: ece, brier, nll,
                      auroc, aurc, prr
    of the uncertainty in nats, mean over problems    total_entropy, expected_entropy, mutual_information, and that
                      with the excess of few samples taken off

The denominator is fixed: what was cut, what cannot be read and what did not fit the context is wrong and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..stats import mean_interval
from ..store import SampleRecord
from ..types import Estimate
from .beliefs import Belief
from .harness import summarise
from .metrics import accuracy, aurc, auroc, brier_top, ece, nll, prr

SAMPLE_ROWS = ("accuracy", "unparsed", "truncated", "trace_tokens")
ANSWER_ROWS = ("answer_accuracy", "ece", "brier", "nll", "auroc", "aurc", "prr")
BELIEF_ROWS = ("total_entropy", "expected_entropy", "mutual_information", "mutual_information_corrected")


@dataclass(frozen=True)
class Measured:
    """rows: metric -> estimate. items: problem -> `correct` (mean over its samples) and, with several samples, the
    fields of its belief."""

    rows: Mapping[str, Estimate]
    items: Mapping[str, Mapping[str, Any]]
    verifier_failures: int


def row_names(traces: int, answers: int, members: int) -> tuple[str, ...]:
    """The metrics that a task with so many samples a problem will have: known before it is run."""
    several = traces * answers * members > 1
    ks = [k for k in (2**i for i in range(1, 20)) if k <= traces * members]
    return (
        *SAMPLE_ROWS,
        *(f"pass@{k}" for k in ks),
        *(ANSWER_ROWS if several else ()),
        *(BELIEF_ROWS[:1] if several and members == 1 else BELIEF_ROWS if several else ()),
    )


def measure(
    records: Sequence[SampleRecord],
    believed: Mapping[str, Belief] | None,
    too_long: Sequence[str],
    members: int,
) -> Measured:
    """records: judged samples, of M = `members` models. believed: problem -> belief, None with one sample a problem.
    too_long: problems that were never drawn, which count as wrong. No record at all gives rows of NaN, flagged."""
    result = summarise(records, members=members > 1, undrawn=too_long)
    rows = result.rows()
    if believed is not None and (believed or too_long):
        rows |= answer_rows(believed, too_long)
    if believed:
        rows |= belief_rows(list(believed.values()), members)
    flag = (f"too_long={len(too_long)}",) if too_long else ()
    rows = {name: replace(row, flags=(*row.flags, *flag)) for name, row in rows.items()}
    known = believed or {}
    items = {
        problem: {"correct": value, **(known[problem].to_json() if problem in known else {})}
        for problem, value in result.per_problem.items()
    }
    if believed is not None:
        items |= {p: {"correct": 0.0, "right": False, "confidence": 0.0} for p in too_long}
    return Measured(rows, items, result.verifier_failures)


def answer_rows(believed: Mapping[str, Belief], too_long: Sequence[str] = ()) -> dict[str, Estimate]:
    """The answer that the ranker chose: is it right, and is its confidence what it should be?"""
    right = np.array([b.right for b in believed.values()] + [False] * len(too_long), dtype=float)
    confidence = np.array([b.confidence for b in believed.values()] + [0.0] * len(too_long))
    confidence = confidence.clip(0.0, 1.0)  # a sum of shares may pass 1 by rounding
    loss = 1.0 - right
    return {
        "answer_accuracy": accuracy(right, list(range(len(right)))),
        "ece": ece(confidence, right),
        "brier": brier_top(confidence, right),
        "nll": nll(confidence, right.astype(int)),
        "auroc": auroc(confidence, right),
        "aurc": aurc(-confidence, loss),
        "prr": prr(-confidence, loss),
    }


def belief_rows(believed: Sequence[Belief], members: int) -> dict[str, Estimate]:
    """Mean over problems, in nats; a problem where it is not defined is dropped and counted."""
    values = {
        "total_entropy": [b.total_entropy for b in believed],
        "expected_entropy": [b.expected_entropy for b in believed],
        "mutual_information": [b.mutual_information for b in believed],
        "mutual_information_corrected": [b.mutual_information_corrected for b in believed],
    }
    names = BELIEF_ROWS[:1] if members == 1 else BELIEF_ROWS
    return {name: mean_interval(values[name], on_invalid="drop") for name in names}
