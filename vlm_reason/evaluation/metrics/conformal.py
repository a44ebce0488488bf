"""Answer sets that hold the right answer with a promised probability."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike

from ...types import Estimate
from .proper import Probabilities


@dataclass(frozen=True)
class ConformalResult:
    """quantile: the threshold on the score, +inf where the calibration set is too small for alpha (flag in
    `coverage.flags`). sets: one tuple of classes (answers) an item. band: central 95 % of the coverage such a
    calibration set gives, Beta(n + 1 - l, l), l = floor((n + 1) alpha)."""

    alpha: float
    score: str
    n_calibration: int
    quantile: float
    band: tuple[float, float]
    sets: tuple[tuple[Any, ...], ...]
    coverage: Estimate
    size: Estimate
    singletons: Estimate
    empty: Estimate


def conformal_quantile(scores: ArrayLike, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest score; +inf if that index > n."""
    raise NotImplementedError


def conformal(
    probabilities: Probabilities,
    labels: ArrayLike,
    test_probabilities: Probabilities,
    test_labels: ArrayLike,
    alpha: float = 0.1,
    score: Literal["lac", "aps"] = "lac",
) -> ConformalResult:
    """Calibrated on the first pair, sets for and coverage on the second."""
    raise NotImplementedError


def conformal_answers(
    answers: Sequence[Sequence[Hashable]],
    gold: Sequence[Any],
    test_answers: Sequence[Sequence[Hashable]],
    test_gold: Sequence[Any],
    alpha: float = 0.1,
) -> ConformalResult:
    """Sets of sampled answers: score 1 - vote share; a gold answer never sampled scores +inf."""
    raise NotImplementedError
