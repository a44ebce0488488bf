"""95% intervals for a mean: Wilson for 0/1 items, Student t otherwise, clustered when items share a cause.

Empty input is NaN with the flag `empty`, never 0. A value that is not finite raises, unless
`on_invalid="drop"`, which counts what it dropped.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, t

from ..types import Estimate

NAN = math.nan
LEVEL = 0.95
OnInvalid = Literal["raise", "drop"]


def mean_interval(values: ArrayLike, on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean of n independent values, SE = s / sqrt(n), interval mean -+ t_{n-1} SE. One value has no SE (NaN,
    flag `single`). Not for 0/1 items (use `wilson`: here 30 of 30 would get an interval of width 0) and not
    for several samples of one item (use `clustered`)."""
    array, dropped = finite(values, on_invalid)
    n = len(array)
    if n == 0:
        return empty("t", dropped)
    mean = float(array.mean())
    if n == 1:
        return Estimate(mean, NAN, (NAN, NAN), 1, dropped, "t", ("single",))
    se = float(array.std(ddof=1)) / math.sqrt(n)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * se
    return Estimate(mean, se, (mean - half, mean + half), n, dropped, "t", ("degenerate",) if se == 0 else ())


def wilson(values: ArrayLike, on_invalid: OnInvalid = "raise") -> Estimate:
    """Share of ones among n independent 0/1 (or bool) items with the Wilson score interval (Wilson 1927),
    which keeps its width at 0 and at 1: 30 of 30 is [0.886, 1]. SE = sqrt(p (1 - p) / n)."""
    array, dropped = finite(values, on_invalid)
    bad = array[(array != 0) & (array != 1)]
    if len(bad):
        raise ValueError(f"wilson takes 0/1 items, got {float(bad[0])}")
    n = len(array)
    if n == 0:
        return empty("wilson", dropped)
    right = int(array.sum())
    share = right / n
    low, high = binomtest(right, n).proportion_ci(confidence_level=LEVEL, method="wilson")
    return Estimate(
        share, math.sqrt(share * (1 - share) / n), (float(low), float(high)), n, dropped, "wilson"
    )


def clustered(values: ArrayLike, clusters: Sequence[Hashable], on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean over N values in C clusters (several samples of one item are one cluster), with the cluster-robust
    error

        SE = sqrt( C/(C-1) sum_g ( sum_{i in g} (y_i - mean) )^2 ) / N          (Miller 2024, arXiv
        2411.00640)

    and the interval mean -+ t_{C-1} SE. `n` is N. A single cluster has no SE (NaN, flag `single`)."""
    raw = np.asarray(values, dtype=float).ravel()
    if len(clusters) != len(raw):
        raise ValueError(f"{len(raw)} values but {len(clusters)} cluster labels")
    array, dropped = finite(raw, on_invalid)
    n = len(array)
    if n == 0:
        return empty("clustered", dropped)
    mean = float(array.mean())
    sums: dict[Hashable, float] = {}
    for label, value, kept in zip(clusters, raw, np.isfinite(raw), strict=True):
        if kept:
            sums[label] = sums.get(label, 0.0) + (float(value) - mean)
    count = len(sums)
    if count == 1:
        return Estimate(mean, NAN, (NAN, NAN), n, dropped, "clustered", ("single",))
    se = math.sqrt(count / (count - 1) * sum(s * s for s in sums.values())) / n
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * se
    flags = ("degenerate",) if se == 0 else ()
    return Estimate(mean, se, (mean - half, mean + half), n, dropped, "clustered", flags)


def finite(values: ArrayLike, on_invalid: OnInvalid = "raise") -> tuple[NDArray[np.float64], int]:
    """The finite values as a flat float array, and how many were dropped. Raises ValueError at the first that
    is not finite unless told to drop."""
    array = np.asarray(values, dtype=float).ravel()
    keep = np.isfinite(array)
    if on_invalid == "raise" and not keep.all():
        index = int(np.argmin(keep))
        raise ValueError(f"value {index} is {array[index]}; pass on_invalid='drop' to leave such values out")
    return array[keep], int((~keep).sum())


def empty(method: str, dropped: int = 0) -> Estimate:
    """The estimate of nothing: NaN, flagged, never 0."""
    return Estimate(NAN, NAN, (NAN, NAN), 0, dropped, method, ("empty",))
