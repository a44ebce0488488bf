"""Does a score tell positives from negatives (out of distribution from in, wrong from right)?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...stats import OnInvalid
from ...types import Estimate


@dataclass(frozen=True)
class RocCurve:
    """One point a distinct score, from (0, 0) to (1, 1): fpr, tpr and the threshold (score >= threshold)."""

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    threshold: NDArray[np.float64]


def roc_curve(score: ArrayLike, positive: ArrayLike, *, on_invalid: OnInvalid = "raise") -> RocCurve:
    """The curve behind `auroc`."""
    raise NotImplementedError


def auroc(
    score: ArrayLike, positive: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """P(score of a positive > score of a negative), ties 1/2. One class only: NaN."""
    raise NotImplementedError


def aupr(
    score: ArrayLike,
    positive: ArrayLike,
    *,
    of_negatives: bool = False,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Average precision of the positives (AUPR-out), or of the negatives by -score (AUPR-in)."""
    raise NotImplementedError


def fpr_at_95(
    score: ArrayLike, positive: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Share of negatives with score >= t, t the ceil(0.95 n_pos)-th largest score of a positive."""
    raise NotImplementedError
