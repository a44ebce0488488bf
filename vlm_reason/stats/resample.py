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
    keep ties together, y too where it has many values, about most / 2 cells in all, and a cell stands for the
    mean of its group."""
    x_values, x_code, x_count = _codes(x)
    y_values, y_code, y_count = _codes(y)
    if len(x_values) <= most:
        key, count = np.unique(x_code * len(y_values) + y_code, return_counts=True)
        if len(key) <= most:
            return Cells(x_values[key // len(y_values)], y_values[key % len(y_values)], count)
    if len(y_values) > _LEVELS:
        y_values, y_code = _coarser(y_values, y_code, y_count, _LEVELS)
    x_values, x_code = _coarser(x_values, x_code, x_count, max(1, most // 2 // len(y_values)))
    dense = np.bincount(x_code * len(y_values) + y_code, minlength=len(x_values) * len(y_values))
    key = np.flatnonzero(dense)
    return Cells(x_values[key // len(y_values)], y_values[key % len(y_values)], dense[key])


def equal_mass(values: Array, groups: int) -> NDArray[np.int64]:
    """Group 0..groups-1 of every value, by rank: equal values share the group that holds the middle of their
    ranks."""
    _, code, count = _codes(values)
    return _ranked(count, groups)[code]


def group_sums(group: NDArray[np.int64], values: Array, groups: int) -> Array:
    """[groups]: the sum of the values of every group."""
    return np.bincount(group, weights=values, minlength=groups).astype(float, copy=False)


def resample(count: NDArray[np.int64], resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """[resamples, A]: how often every cell is drawn when all items are drawn anew with replacement."""
    n, kinds = int(count.sum()), len(count)
    generator = np.random.default_rng(seed)
    if n > 2 * kinds:
        return generator.multinomial(n, count / n, size=resamples)
    drawn = np.repeat(np.arange(kinds), count)[generator.integers(0, max(n, 1), size=(resamples, n))]
    drawn += kinds * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * kinds).reshape(resamples, kinds)


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


def _codes(values: Array) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    distinct, code, count = np.unique(values, return_inverse=True, return_counts=True)
    return distinct, code.ravel(), count


def _ranked(count: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """The group of every distinct value, from how often each one is there."""
    middle = np.cumsum(count) - count / 2
    return np.floor(middle * groups / max(int(count.sum()), 1)).astype(np.int64)


def _coarser(
    values: Array, code: NDArray[np.int64], count: NDArray[np.int64], groups: int
) -> tuple[Array, NDArray[np.int64]]:
    """Group means in place of the distinct values, and the group of every item."""
    group = _ranked(count, groups)
    mass = group_sums(group, count.astype(float), groups)
    means = group_sums(group, values * count, groups) / np.maximum(mass, 1)
    return means, group[code]
