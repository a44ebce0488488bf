"""A system minus the first, on the same problems: by items where the metric is a mean over problems, by
resampling the problems where it is a curve's area or a binned error.

The four statistics below are the values of the metrics of the same names, without their intervals: a resampled
difference takes a thousand of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from ..items import Array
from ..metrics import compare
from .figures import Difference

RESAMPLES = 1000
WORK = 2e7
"""Fewer resamples for more problems, at least 200: this many values in all."""
BINS = 15
Answered = tuple[Array, Array]
"""Confidence and rightness (0/1) of the chosen answers, problems in the same order in both systems."""


def by_item(values: Array, first: Array, ids: Sequence[str], ids_first: Sequence[str]) -> Difference | None:
    """`metrics.compare` of the values of the problems; None where a problem has none."""
    if not (np.isfinite(values).all() and np.isfinite(first).all()):
        return None
    found = compare(values, first, ids, ids_first)
    return Difference(found.value, found.ci, found.p, found.test)


def by_resampling(
    statistic: Callable[[Array, Array], float], own: Answered, first: Answered, seed: int = 0
) -> Difference:
    """Percentile interval over draws of the problems with replacement, the same problems for both systems, and the
    two-sided p that goes with it: twice the smaller share of draws on either side of 0."""
    n = len(own[0])
    times = int(min(RESAMPLES, max(200, WORK / max(n, 1))))
    generator = np.random.default_rng(seed)
    drawn = np.empty(times)
    for i in range(times):
        rows = generator.integers(0, n, n)
        drawn[i] = statistic(own[0][rows], own[1][rows]) - statistic(first[0][rows], first[1][rows])
    drawn = drawn[np.isfinite(drawn)]
    value = statistic(*own) - statistic(*first)
    if len(drawn) < times / 2:
        return Difference(value, (math.nan, math.nan), math.nan, "undefined on most resamples")
    low, high = np.quantile(drawn, (0.025, 0.975))
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (1 + beyond) / (1 + len(drawn)))
    return Difference(value, (float(low), float(high)), p, f"{times} resamples of the problems")


def ratio(part: Array, whole: Array) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else math.nan


def ece(confidence: Array, right: Array) -> float:
    bins = np.clip(np.ceil(confidence * BINS - 1e-12), 1, BINS).astype(np.int64) - 1
    gap = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gap).sum() / len(right))


def auroc(confidence: Array, right: Array) -> float:
    good = int(right.sum())
    if good in (0, len(right)):
        return math.nan
    ranks = rankdata(confidence)[right > 0].sum()
    return float((ranks - good * (good + 1) / 2) / (good * (len(right) - good)))


def aurc(confidence: Array, right: Array) -> float:
    """Inside a group of equal confidence the loss grows by the group's mean."""
    _, group, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    mean = np.bincount(group, weights=1 - right) / size
    return float((np.cumsum(np.repeat(mean, size)) / np.arange(1, len(right) + 1)).mean())


def prr(confidence: Array, right: Array) -> float:
    base, best = float((1 - right).mean()), aurc(right, right)
    return (base - aurc(confidence, right)) / (base - best) if base > best else math.nan
