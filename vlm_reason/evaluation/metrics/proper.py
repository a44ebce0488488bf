"""Proper scores of probabilities: log loss and Brier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from numpy.typing import ArrayLike

from ...stats import OnInvalid
from ...types import Estimate

Probabilities = ArrayLike | Sequence[ArrayLike]
"""[n, K], or n vectors of different lengths K_i. [n]: P(label = 1) of a 0/1 label."""


def nll(
    probabilities: Probabilities,
    labels: ArrayLike,
    *,
    unit: Literal["nats", "bits"] = "nats",
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """-mean log p_i[y_i]."""
    raise NotImplementedError


def brier(probabilities: Probabilities, labels: ArrayLike, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """`brier_top` for probabilities [n], `brier_multiclass` for class vectors; `method` says which."""
    raise NotImplementedError


def brier_top(confidence: ArrayLike, correct: ArrayLike, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """mean (c - y)^2 in [0, 1]."""
    raise NotImplementedError


def brier_multiclass(
    probabilities: Probabilities, labels: ArrayLike, *, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """mean sum_k (p_k - 1[k = y])^2 in [0, 2]."""
    raise NotImplementedError
