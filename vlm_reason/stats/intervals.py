"""95% intervals for a mean: Wilson for 0/1 items, Student t otherwise, clustered when values share an item.

Empty input is NaN with the flag `empty`, never 0. A value that is not finite raises, unless
`on_invalid="drop"`, which counts what it dropped.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm, t

from ..types import Estimate

NAN = math.nan
LEVEL = 0.95
OnInvalid = Literal["raise", "drop"]
Labels = Sequence[Hashable] | NDArray[Any]


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
    se = _rounded_off(float(array.std(ddof=1)) / math.sqrt(n), mean)
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


def clustered(values: ArrayLike, clusters: Labels, on_invalid: OnInvalid = "raise") -> Estimate:
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
    codes, _ = factorise(clusters)
    _, codes = np.unique(codes[np.isfinite(raw)], return_inverse=True)
    sums = np.bincount(codes, weights=array - mean)
    count = len(sums)
    if count == 1:
        return Estimate(mean, NAN, (NAN, NAN), n, dropped, "clustered", ("single",))
    se = _rounded_off(math.sqrt(count / (count - 1) * float(sums @ sums)) / n, mean)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * se
    flags = ("degenerate",) if se == 0 else ()
    return Estimate(mean, se, (mean - half, mean + half), n, dropped, "clustered", flags)


def clustered_share(shares: ArrayLike, clusters: Labels, on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean of values in [0, 1] in C clusters: value and SE of `clustered`, with an interval that stays in [0,
    1] and keeps its width at 0 and at 1: Wilson's, at the number of independent items that the clustered
    error is worth,

        n_eff = mean (1 - mean) / SE^2  *  (z / t_{C-1})^2          (as in Korn & Graubard 1998, for Wilson)

    and n_eff = C (z / t_{C-1})^2 where every value is 0, or every value is 1 (flag `degenerate`)."""
    array = np.asarray(shares, dtype=float).ravel()
    with np.errstate(invalid="ignore"):
        bad = array[(array < 0) | (array > 1)]
    if len(bad):
        raise ValueError(f"shares must be in [0, 1], got {float(bad[0])}")
    basic = clustered(array, clusters, on_invalid)
    if not math.isfinite(basic.se):
        return basic
    codes, _ = factorise(clusters)
    ci = _wilson_at(basic, len(np.unique(codes[np.isfinite(array)])))
    return replace(basic, ci=ci, method="clustered wilson")


def share_interval(values: ArrayLike, on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean of n independent values in [0, 1], one an item: `clustered_share` with every item on its own. For
    0/1 values use `wilson`, which is exact about n."""
    array = np.asarray(values, dtype=float).ravel()
    estimate = clustered_share(array, np.arange(len(array)), on_invalid)
    return replace(estimate, method="wilson at the effective n")


def _wilson_at(basic: Estimate, count: int) -> tuple[float, float]:
    """Wilson's interval at the number of 0/1 items that the SE of `basic` over `count` clusters is worth."""
    z, mean = float(norm.ppf((1 + LEVEL) / 2)), basic.value
    worth = mean * (1 - mean) / basic.se**2 if basic.se > 0 else float(count)
    worth *= (z / float(t.ppf((1 + LEVEL) / 2, count - 1))) ** 2
    centre = (mean + z * z / (2 * worth)) / (1 + z * z / worth)
    half = z / (1 + z * z / worth) * math.sqrt(mean * (1 - mean) / worth + z * z / (4 * worth * worth))
    return max(0.0, centre - half), min(1.0, centre + half)


def factorise(labels: Labels) -> tuple[NDArray[np.int64], int]:
    """Integer codes 0, 1, ... of the labels in order of first appearance, and how many there are. Equal
    labels, equal codes; a million strings take a fraction of a second."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iub":
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        order = np.empty(len(first), dtype=np.int64)
        order[np.argsort(first)] = np.arange(len(first))
        return order[inverse.ravel()], len(first)
    known: dict[Hashable, int] = {}
    codes = np.fromiter((known.setdefault(x, len(known)) for x in labels), dtype=np.int64, count=len(labels))
    return codes, len(known)


def _rounded_off(se: float, mean: float) -> float:
    """0 where the spread is rounding: equal values such as 1/10 need not sum to their exact mean."""
    return 0.0 if se <= 1e-12 * max(1.0, abs(mean)) else se


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
