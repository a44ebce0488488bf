"""95% intervals for a mean: Wilson for 0/1 items, Student t otherwise, clustered when values share an item.

Empty input is NaN with the flag `empty`, never 0. A value that is not finite raises, unless
`on_invalid="drop"`, which counts what it dropped.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm, t

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


def clustered_share(shares: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """Mean of values in [0, 1] in C clusters: value and SE of `clustered`, with an interval that stays in [0,
    1] and keeps its width at 0 and at 1: Wilson's, at the number of independent items that the clustered
    error is worth,

        n_eff = mean (1 - mean) / SE^2  *  (z / t_{C-1})^2          (as in Korn & Graubard 1998, for Wilson)

    and n_eff = C (z / t_{C-1})^2 where every value is 0, or every value is 1 (flag `degenerate`)."""
    basic = clustered(shares, clusters)
    array = np.asarray(shares, dtype=float)
    if len(array) and (array.min() < 0 or array.max() > 1):
        raise ValueError(f"shares must be in [0, 1], got {array.min()} to {array.max()}")
    if not math.isfinite(basic.se):
        return basic
    count = len(set(clusters))
    z, mean = float(norm.ppf((1 + LEVEL) / 2)), basic.value
    worth = mean * (1 - mean) / basic.se**2 if basic.se > 0 else float(count)
    worth *= (z / float(t.ppf((1 + LEVEL) / 2, count - 1))) ** 2
    centre = (mean + z * z / (2 * worth)) / (1 + z * z / worth)
    half = z / (1 + z * z / worth) * math.sqrt(mean * (1 - mean) / worth + z * z / (4 * worth * worth))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return replace(basic, ci=(low, high), method="clustered wilson")


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
