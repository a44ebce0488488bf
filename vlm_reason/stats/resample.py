"""The bootstrap over items, fast enough for a million of them.

Items that are alike are one *cell*: a resample of n items is one multinomial draw over the cells, and a
statistic of weighted cells is computed for all resamples at once. Up to `CELLS` distinct items this is the
bootstrap exactly. Beyond that, neighbours share a cell, for the resamples alone: the value itself always comes
from all items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import Estimate
from .intervals import LEVEL, NAN

Array = NDArray[np.float64]
RESAMPLES = 1000
CELLS = 2048
_LEVELS = 32


@dataclass(frozen=True)
class Cells:
    """Distinct pairs (x, y) in order of x and then y, [A] each, with the number of items behind them."""

    x: Array
    y: Array
    count: NDArray[np.int64]


def cells(x: Array, y: Array, most: int = CELLS) -> Cells:
    """The distinct pairs of x and y; if there are more than `most`, x is cut into groups of equal mass that
    keep ties together, y too where it has many values, and a cell stands for the mean of its group."""
    found = _distinct(x, y)
    if len(found.count) <= most:
        return found
    levels = len(np.unique(y))
    if levels > _LEVELS:
        y, levels = group_means(y, equal_mass(y, _LEVELS)), _LEVELS
    return _distinct(group_means(x, equal_mass(x, max(1, most // levels))), y)


def equal_mass(values: Array, groups: int) -> NDArray[np.int64]:
    """Group 0..groups-1 of every value, by rank: equal values share the group that holds the middle of their
    ranks."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2
    return np.floor(middle * groups / max(len(values), 1)).astype(np.int64)[inverse.ravel()]


def group_means(values: Array, group: NDArray[np.int64]) -> Array:
    """Every value replaced by the mean of its group."""
    sums, count = np.bincount(group, weights=values), np.bincount(group)
    return (sums / np.maximum(count, 1))[group]


def resample(count: NDArray[np.int64], resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """[resamples, A]: how often every cell is drawn when all items are drawn anew with replacement."""
    n = int(count.sum())
    return np.random.default_rng(seed).multinomial(n, count / max(n, 1), size=resamples)


def summarise(
    value: float,
    replicates: Array,
    n: int,
    *,
    dropped: int = 0,
    method: str = "bootstrap",
    flags: tuple[str, ...] = (),
    bounds: tuple[float, float] = (-np.inf, np.inf),
    centre: bool = False,
) -> Estimate:
    """`value` with the standard deviation of its replicates and their percentile interval. NaN replicates (a
    resample without one of the classes) are left out. `centre`: the replicates are moved to have the mean
    `value`, for statistics that resampling itself biases (an absolute difference). One item has no SE (flag
    `single`); replicates that never differ are flagged `degenerate`."""
    kept = replicates[np.isfinite(replicates)]
    if not np.isfinite(value):
        return Estimate(value, NAN, (NAN, NAN), n, dropped, method, flags)
    if n == 1 or len(kept) < 2:
        return Estimate(value, NAN, (NAN, NAN), n, dropped, method, (*flags, "single"))
    se = float(kept.std(ddof=1))
    if np.ptp(kept) <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, 0.0, (value, value), n, dropped, method, (*flags, "degenerate"))
    shift = value - float(kept.mean()) if centre else 0.0
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + shift
    ci = (float(np.clip(low, *bounds)), float(np.clip(high, *bounds)))
    return Estimate(value, se, ci, n, dropped, method, flags)


def in_blocks(weights: NDArray[np.int64], statistic: Callable[[Array], Array]) -> Array:
    """statistic([r, A]) -> [r] over all rows, some at a time so that no temporary exceeds some ten MB."""
    rows = max(1, 1_000_000 // max(weights.shape[1], 1))
    parts = [statistic(weights[i : i + rows].astype(float)) for i in range(0, len(weights), rows)]
    return np.concatenate(parts) if parts else np.empty(0)


def _distinct(x: Array, y: Array) -> Cells:
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    new = np.ones(len(x), dtype=bool)
    new[1:] = (x[1:] != x[:-1]) | (y[1:] != y[:-1])
    start = np.flatnonzero(new)
    return Cells(x[start], y[start], np.diff(np.append(start, len(x))))
