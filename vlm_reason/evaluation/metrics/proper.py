"""Proper scores of probabilities: log loss and Brier. They are least, in expectation, at the true probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import UserError
from ...stats import OnInvalid, group_sums, mean_interval
from ...types import Estimate
from .inputs import Array, Column, Ragged, clean, ragged

Probabilities = ArrayLike | Sequence[ArrayLike]
"""[n, K]; or n vectors of lengths K_i that differ; or [n], P(label = 1) of a 0/1 label."""

CLIP = 1e-12
SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ClassVectors:
    """Class probabilities of n items, and their labels [n]."""

    rows: Ragged
    label: NDArray[np.int64]

    @property
    def of_label(self) -> Array:
        """[n]: p_i[y_i]."""
        return self.rows.flat[self.rows.start + self.label]


def nll(
    probabilities: Probabilities,
    labels: ArrayLike,
    *,
    unit: Literal["nats", "bits"] = "nats",
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """-mean log p_i[y_i], in nats or bits; t interval over items. A probability below 1e-12 counts as 1e-12, or one
    item would make the mean infinite; their number is in the flag `clipped:<number>`. Not for comparing models whose
    classes differ (the log loss of more classes is larger)."""
    if unit not in ("nats", "bits"):
        raise UserError(f"unit must be 'nats' or 'bits', got {unit!r}")
    if _binary(probabilities):
        p, y, dropped = _pairs(probabilities, labels, "probabilities", "labels", on_invalid)
        of_label = np.where(y == 1, p, 1 - p)
    else:
        vectors, dropped = class_vectors(probabilities, labels, on_invalid)
        of_label = vectors.of_label
    loss = -np.log(np.maximum(of_label, CLIP)) / (math.log(2) if unit == "bits" else 1.0)
    clipped = int((of_label < CLIP).sum())
    estimate = _mean(loss, dropped, f"nll, {unit}")
    return replace(estimate, flags=(*estimate.flags, f"clipped:{clipped}")) if clipped else estimate


def brier(probabilities: Probabilities, labels: ArrayLike, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """`brier_top` for probabilities [n], `brier_multiclass` for class vectors. They are different numbers (for two
    classes the second is twice the first), so `method` says which it was."""
    score = brier_top if _binary(probabilities) else brier_multiclass
    return score(probabilities, labels, on_invalid=on_invalid)  # type: ignore[arg-type]


def brier_top(confidence: ArrayLike, correct: ArrayLike, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """mean (c - y)^2 in [0, 1], c the confidence in the chosen answer and y whether it is right (Brier 1950, binary
    form); t interval over items."""
    c, y, dropped = _pairs(confidence, correct, "confidence", "correct", on_invalid)
    return _mean((c - y) ** 2, dropped, "brier top-label")


def brier_multiclass(
    probabilities: Probabilities, labels: ArrayLike, *, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """mean sum_k (p_k - 1[k = y])^2 in [0, 2] (Brier 1950); K may differ between items; t interval over items."""
    vectors, dropped = class_vectors(probabilities, labels, on_invalid)
    error = vectors.rows.flat.copy()
    error[vectors.rows.start + vectors.label] -= 1.0
    loss = group_sums(vectors.rows.item, error**2, len(vectors.label))
    return _mean(loss, dropped, "brier multiclass")


def class_vectors(
    probabilities: Probabilities, labels: ArrayLike, on_invalid: OnInvalid = "raise"
) -> tuple[ClassVectors, int]:
    """The class vectors and labels, and how many items were dropped. An item is invalid if a probability is not in
    [0, 1] (NaN included), if they do not sum to 1, or if its label is not one of its classes: never a wrong answer,
    always an error or a counted drop."""
    rows = ragged("probabilities", probabilities)  # type: ignore[arg-type]
    label = np.atleast_1d(np.asarray(labels, dtype=float))
    if label.shape != (len(rows.size),):
        raise UserError(f"{len(rows.size)} rows of probabilities but labels of shape {label.shape}")
    item = rows.item
    in_range = (rows.flat >= 0) & (rows.flat <= 1)
    good = np.bincount(item[~in_range], minlength=len(rows.size)) == 0
    total = group_sums(item, np.where(in_range, rows.flat, 0.0), len(rows.size))
    unit = np.abs(total - 1) <= SUM_TOLERANCE
    known = (label >= 0) & (label < rows.size) & (label == np.floor(label))
    keep = good & unit & known
    if on_invalid == "raise" and not keep.all():
        i = int(np.argmin(keep))
        row = rows.flat[rows.start[i] : rows.start[i] + rows.size[i]]
        raise UserError(f"item {i}: {_complaint(row, float(label[i]))}; mend it, or pass on_invalid='drop'")
    return ClassVectors(Ragged(rows.flat[keep[item]], rows.size[keep]), label[keep].astype(np.int64)), int(
        (~keep).sum()
    )


def _complaint(row: Array, label: float) -> str:
    shown = np.array2string(row, precision=6, threshold=8)
    if not ((row >= 0) & (row <= 1)).all():
        return f"probabilities {shown} are not all in [0, 1]"
    if abs(row.sum() - 1) > SUM_TOLERANCE:
        return f"probabilities {shown} sum to {row.sum():.6g}, not 1"
    return f"label {label:g} is none of its {len(row)} classes"


def _binary(probabilities: Probabilities) -> bool:
    """One number an item?"""
    if isinstance(probabilities, np.ndarray):
        return probabilities.ndim <= 1 and probabilities.dtype != object
    return not isinstance(probabilities, Sequence) or all(np.ndim(row) == 0 for row in probabilities[:1])


def _pairs(
    first: Probabilities, second: ArrayLike, name_a: str, name_b: str, on_invalid: OnInvalid
) -> tuple[Array, Array, int]:
    columns = Column(name_a, first, "unit"), Column(name_b, second, "binary")  # type: ignore[arg-type]
    [a, b], dropped = clean(*columns, on_invalid=on_invalid)
    return a, b, dropped


def _mean(loss: Array, dropped: int, method: str) -> Estimate:
    return replace(mean_interval(loss), n_dropped=dropped, method=f"{method}; t")
