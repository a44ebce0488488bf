"""Calibration of every class probability, not of the chosen one alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from ...errors import UserError
from ...stats import RESAMPLES, OnInvalid, empty, group_sums, summarise
from ...types import Estimate
from .binning import Scheme, make_bins
from .inputs import Array
from .proper import class_vectors


def classwise_ece(
    probabilities: ArrayLike,
    labels: ArrayLike,
    bins: int = 15,
    scheme: Scheme = "width",
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Classwise ECE (Kull et al. 2019, arXiv 1910.12656) of probabilities [n, K] and labels [n]:

        (1/K) sum_k sum_b (n_bk / n) | mean of 1[y = k] - mean of p_k in bin b |

    Only for tasks whose classes mean the same on every item. Option letters do not: class "A" is another answer on
    every question. `classes` names the classes; single letters are refused, and so are items that differ in K.

    SE and interval: multiplier bootstrap over items (Gaussian, with the covariance of the bin sums), bins fixed,
    replicates moved to the value. Reads above 0 for calibrated answers, as `ece`."""
    p, y, dropped = _matrix(probabilities, labels, classes, on_invalid)
    method = f"classwise ECE, {bins} bins of equal {scheme}; multiplier bootstrap"
    columns = [make_bins(p[:, k], bins, scheme).of for k in range(p.shape[1])]
    everywhere = np.ones(p.shape, dtype=bool)
    return _mean_over_classes(p, y, columns, everywhere, method, dropped, seed)


def tace(
    probabilities: ArrayLike,
    labels: ArrayLike,
    bins: int = 15,
    threshold: float = 0.01,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Thresholded adaptive calibration error (Nixon et al. 2019, arXiv 1904.01685): as `classwise_ece`, but bins of
    equal mass a class, over the probabilities above `threshold` alone, so that a crowd of tiny ones does not
    drown the rest; n counts those of the class. `threshold` 0 is the adaptive calibration error. A class without
    any is left out of the mean."""
    if not 0 <= threshold < 1:
        raise UserError(f"threshold must be in [0, 1), got {threshold}")
    p, y, dropped = _matrix(probabilities, labels, classes, on_invalid)
    used = p > threshold
    columns = [np.zeros(len(p), dtype=np.int64) for _ in range(p.shape[1])]
    for k, column in enumerate(columns):
        column[used[:, k]] = make_bins(p[used[:, k], k], bins, "mass").of
    method = f"TACE, {bins} bins of equal mass, p > {threshold:g}; multiplier bootstrap"
    return _mean_over_classes(p, y, columns, used, method, dropped, seed)


def _mean_over_classes(
    p: Array,
    y: NDArray[np.int64],
    columns: Sequence[NDArray[np.int64]],
    used: NDArray[np.bool_],
    method: str,
    dropped: int,
    seed: int,
) -> Estimate:
    """(1/K) sum_k (1/n_k) sum_b |D_kb|, with D_kb the sum of 1[y = k] - p_k in bin b of class k, over `used`."""
    n, k = p.shape
    if n == 0 or not used.any():
        return empty(method, dropped)
    width = max(int(column.max()) for column in columns) + 1
    place = np.stack(columns, axis=1) + width * np.arange(k)
    gap = ((y[:, None] == np.arange(k)) - p) * used
    sums = group_sums(place.ravel(), gap.ravel(), k * width)
    per_class = used.sum(axis=0)
    scale = (
        np.repeat(np.where(per_class > 0, 1.0 / np.maximum(per_class, 1), 0.0), width) / (per_class > 0).sum()
    )
    rows = csr_array((gap.ravel(), place.ravel(), np.arange(n + 1) * k), shape=(n, k * width))
    covariance = (rows.T @ rows).toarray() - np.outer(sums, sums) / n
    value, vector = np.linalg.eigh(covariance)
    draws = np.random.default_rng(seed).standard_normal((RESAMPLES, len(value)))
    noise = draws * np.sqrt(np.maximum(value, 0.0)) @ vector.T
    return summarise(
        float(np.abs(sums) @ scale),
        np.abs(sums + noise) @ scale,
        n,
        dropped=dropped,
        method=method,
        bounds=(0.0, 1.0),
        centre=True,
    )


def _matrix(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str] | None, on_invalid: OnInvalid
) -> tuple[Array, NDArray[np.int64], int]:
    if classes is not None and len(classes) > 1 and all(len(name.strip("(). ")) == 1 for name in classes):
        raise UserError(
            f"classes {', '.join(classes)} are option letters, which mean something else on every item: use ece on the "
            "chosen answer"
        )
    vectors, dropped = class_vectors(probabilities, labels, on_invalid)
    sizes = np.unique(vectors.rows.size)
    if len(sizes) > 1:
        raise UserError(
            f"items have {sizes[0]} to {sizes[-1]} classes; classwise errors need the same classes on every item"
        )
    k = int(sizes[0]) if len(sizes) else 1
    if classes is not None and len(sizes) and len(classes) != k:
        raise UserError(f"{len(classes)} names in classes but {k} probabilities an item")
    return vectors.rows.flat.reshape(-1, k), vectors.label, dropped
