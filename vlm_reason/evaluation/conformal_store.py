"""Conformal sets of sampled answers, calibrated on one store and used on another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..stats import wilson
from ..store import SampleRecord
from .beliefs import by_problem
from .metrics import conformal_answers

NEVER_SAMPLED = "\x00 never sampled"
"""Stands for a right answer that is not among the samples: no set can hold it."""


def answers_and_gold(records: Sequence[SampleRecord]) -> tuple[list[list[str | None]], list[str]]:
    """Of every problem the canonical answers of its samples (None: cut or unreadable), and the right one among them."""
    answers: list[list[str | None]] = []
    gold = []
    for own in by_problem(records).values():
        answers.append([r.canonical for r in own])
        gold.append(next((r.canonical for r in own if r.correct and r.canonical is not None), NEVER_SAMPLED))
    return answers, gold


def conformal_of_records(
    calibration: Sequence[SampleRecord], records: Sequence[SampleRecord], alpha: float
) -> dict[str, Any]:
    """Coverage, size and shares of singletons and empty sets at level 1 - alpha, and the share of problems whose right
    answer was sampled at all: no set of sampled answers covers more, which is said where it matters."""
    answers, gold = answers_and_gold(calibration)
    test_answers, test_gold = answers_and_gold(records)
    if not answers or not test_answers:
        raise UserError("conformal sets need problems to calibrate on and problems to use them on")
    result = conformal_answers(answers, gold, test_answers, test_gold, alpha)
    sampled = wilson([g != NEVER_SAMPLED for g in test_gold])
    remarks = []
    if sampled.value < 1 - alpha:
        remarks.append(
            f"coverage {1 - alpha:g} cannot be reached: the right answer is among the samples of only "
            f"{sampled.value:.3f} of the problems; draw more samples or allow a larger alpha"
        )
    return {
        "alpha": alpha,
        "quantile": result.quantile,
        "band": list(result.band),
        "calibration_problems": result.n_calibration,
        "coverage": result.coverage.to_json(),
        "size": result.size.to_json(),
        "singletons": result.singletons.to_json(),
        "empty": result.empty.to_json(),
        "sampled": sampled.to_json(),
        "remarks": remarks,
    }
