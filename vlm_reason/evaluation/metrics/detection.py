"""Does a score tell positives from negatives?

For out-of-distribution detection the positive is OOD and the score an uncertainty; for failure prediction the
positive is a wrong answer. AUPR and FPR95 change when the classes are swapped: say which one was positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from ...stats import OnInvalid, cells, empty, in_blocks, resample, summarise
from ...types import Estimate
from .inputs import Array, Column, clean

NAN = float("nan")


@dataclass(frozen=True)
class RocCurve:
    """One point a distinct score, from (0, 0) to (1, 1): the share of negatives and of positives with score >=
    threshold."""

    fpr: Array
    tpr: Array
    threshold: Array


def roc_curve(score: ArrayLike, positive: ArrayLike, *, on_invalid: OnInvalid = "raise") -> RocCurve:
    """The curve behind `auroc` (scikit-learn's). Without one of the classes its axis is NaN."""
    from sklearn.metrics import roc_curve as curve

    [s, y], _ = _columns(score, positive, on_invalid)
    if not len(s) or not 0 < y.sum() < len(y):
        sides = [np.array([0.0, 1.0]) if (y == side).any() else np.full(2, NAN) for side in (0, 1)]
        return RocCurve(sides[0], sides[1], np.array([np.inf, s.min() if len(s) else -np.inf]))
    return RocCurve(*curve(y, s, drop_intermediate=False))


def auroc(score: ArrayLike, positive: ArrayLike, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """P(score of a random positive > score of a random negative), ties 1/2. score [n] any finite number, positive [n]
    0/1. SE of DeLong et al. 1988; interval on the logit scale, so inside (0, 1), and where the classes are separated
    without exception (SE 0, flag `degenerate`) the one of Newcombe 2006 (method 5), which keeps its width. One class
    only: NaN, flag `one class`. Not alone where positives are rare: see `aupr`."""
    [s, y], dropped = _columns(score, positive, on_invalid)
    method = "AUROC; DeLong"
    nothing = _nothing(y, dropped, method)
    if nothing is not None:
        return nothing
    high, low = s[y == 1], s[y == 0]
    m, n = len(high), len(low)
    rank = rankdata(np.concatenate([high, low]))
    above = (rank[:m] - rankdata(high)) / n  # share of negatives below each positive
    below = (rank[m:] - rankdata(low)) / m  # share of positives below each negative
    value = float(above.mean())
    if min(m, n) < 2:
        return Estimate(value, NAN, (NAN, NAN), len(y), dropped, method, ("single",))
    se = float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    if se < 1e-12:
        ci = _newcombe(value, m, n) if value in (0.0, 1.0) else (value, value)
        return Estimate(value, 0.0, ci, len(y), dropped, method, ("degenerate",))
    z = float(norm.ppf(0.975))
    if not 0 < value < 1:
        return Estimate(value, se, (value, value), len(y), dropped, method)
    half = z * se / (value * (1 - value))
    ci = (float(expit(logit(value) - half)), float(expit(logit(value) + half)))
    return Estimate(value, se, ci, len(y), dropped, method)


def aupr(
    score: ArrayLike,
    positive: ArrayLike,
    *,
    of_negatives: bool = False,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Average precision, sum_t (recall_t - recall_{t-1}) precision_t over distinct thresholds: of the positives by
    rising score (AUPR-out when the positive is OOD), or `of_negatives` by falling score (AUPR-in). Chance is the
    share of that class, not 1/2. SE and interval: bootstrap over items. One class only: NaN."""
    [s, y], dropped = _columns(score, positive, on_invalid)
    if of_negatives:
        s, y = -s, 1 - y
    method = f"AUPR of the {'negatives' if of_negatives else 'positives'}; bootstrap"
    return _thresholds(s, y, _average_precision, method, dropped, seed)


def fpr_at_95(
    score: ArrayLike, positive: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Share of negatives with score >= t, t the ceil(0.95 n_pos)-th largest score of a positive: false alarms when 95 %
    of the positives are found. With the classes swapped it is another number. SE and interval: bootstrap over
    items. One class only: NaN."""
    [s, y], dropped = _columns(score, positive, on_invalid)
    return _thresholds(s, y, _fpr, "FPR at 95 % TPR; bootstrap", dropped, seed)


Curve = Callable[[Array, Array], Array]
"""Positives and negatives at every distinct score, highest first, [resamples, scores] each -> [resamples]."""


def _thresholds(s: Array, y: Array, statistic: Curve, method: str, dropped: int, seed: int) -> Estimate:
    nothing = _nothing(y, dropped, method)
    if nothing is not None:
        return nothing
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(*_by_score(s, y, np.ones((1, len(s)))))[0])
        alike = cells(s, y)
        replicates = in_blocks(
            resample(alike.count, seed=seed), lambda w: statistic(*_by_score(alike.x, alike.y, w))
        )
    return summarise(value, replicates, len(y), dropped=dropped, method=method)


def _by_score(s: Array, y: Array, weight: Array) -> tuple[Array, Array]:
    order = np.argsort(-s, kind="stable")
    start = np.flatnonzero(np.diff(s[order], prepend=np.nan) != 0)
    weight, y = weight[:, order], y[order]
    return np.add.reduceat(weight * y, start, axis=1), np.add.reduceat(weight * (1 - y), start, axis=1)


def _average_precision(positives: Array, negatives: Array) -> Array:
    found, alarms = np.cumsum(positives, axis=1), np.cumsum(negatives, axis=1)
    precision = found / np.maximum(found + alarms, 1)
    return (positives * precision).sum(axis=1) / found[:, -1]


def _fpr(positives: Array, negatives: Array) -> Array:
    found, alarms = np.cumsum(positives, axis=1), np.cumsum(negatives, axis=1)
    wanted = np.ceil(0.95 * found[:, -1:] - 1e-9)
    at = np.argmax(found >= wanted, axis=1)
    rate = alarms[np.arange(len(at)), at] / alarms[:, -1]
    return np.where(found[:, -1] > 0, rate, np.nan)  # a resample without a positive has no such rate


def _nothing(y: Array, dropped: int, method: str) -> Estimate | None:
    """The estimate where there is no positive or no negative."""
    if not len(y):
        return empty(method, dropped)
    if y.min() == y.max():
        return replace(empty(method, dropped), n=len(y), flags=("one class",))
    return None


def _newcombe(value: float, m: int, n: int) -> tuple[float, float]:
    """theta with |value - theta| = z sqrt(V(theta)), for value 0 or 1, where

    V = theta (1 - theta) [1 + N (1 - theta) / (2 - theta) + N theta / (1 + theta)] / (m n),  N = (m + n) / 2 - 1."""
    z, big = float(norm.ppf(0.975)), (m + n) / 2 - 1

    def excess(theta: float) -> float:
        inner = 1 + big * (1 - theta) / (2 - theta) + big * theta / (1 + theta)
        return float((1 - theta) - z * np.sqrt(theta * (1 - theta) * inner / (m * n)))

    bound = float(brentq(excess, 1e-12, 1 - 1e-12))
    return (bound, 1.0) if value == 1.0 else (0.0, 1.0 - bound)


def _columns(score: ArrayLike, positive: ArrayLike, on_invalid: OnInvalid) -> tuple[list[Array], int]:
    columns = Column("score", score, "finite"), Column("positive", positive, "binary")
    return clean(*columns, on_invalid=on_invalid)
