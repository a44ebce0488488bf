"""Calibration of every class probability, not of the chosen one alone."""

from __future__ import annotations

from numpy.typing import ArrayLike

from ...stats import OnInvalid
from ...types import Estimate
from .binning import Scheme


def classwise_ece(
    probabilities: ArrayLike,
    labels: ArrayLike,
    bins: int = 15,
    scheme: Scheme = "width",
    *,
    fixed_labels: bool | None = None,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """(1/K) sum_k sum_b (n_bk / n) |mean y - mean p_k|, probabilities [n, K]. Refused unless the caller says
    `fixed_labels=True`: the classes mean the same on every item (not options A, B, C, D)."""
    raise NotImplementedError


def tace(
    probabilities: ArrayLike,
    labels: ArrayLike,
    bins: int = 15,
    threshold: float = 0.01,
    *,
    fixed_labels: bool | None = None,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Adaptive calibration error: equal mass bins a class, of the probabilities above `threshold`."""
    raise NotImplementedError
