"""Several draws an item: is any right, are all right, is the best-scored one right?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ...errors import UserError
from ...stats import OnInvalid, group_sums, share_interval
from ...types import Estimate
from .inputs import Array, Column, Ragged, as_items, clean, ragged, same_sizes, spoilt, whole


def pass_at_k_of_item(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k draws is right) from n draws of which `correct` are (Chen et
    al. 2021, arXiv 2107.03374):

        1 - C(n - c, k) / C(n, k) = 1 - prod_{j = n-c+1}^{n} (1 - k / j)

    1 if n - c < k; NaN if k > n, because n draws say nothing of more than n."""
    _check_counts(n, correct, k)
    if k > n:
        return math.nan
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - correct + 1, n + 1))


def pass_hat_k_of_item(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(all of k draws are right): C(c, k) / C(n, k). NaN if k > n."""
    _check_counts(n, correct, k)
    return math.nan if k > n else math.comb(correct, k) / math.comb(n, k)


def pass_at_k(correct: ArrayLike, total: ArrayLike, k: int, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean over items of `pass_at_k_of_item`; correct[i] of total[i] draws of item i are right.

    The item is what is resampled, so the interval is over items (`stats.share_interval`: closed form, inside [0, 1],
    with its width where all items agree). Items with fewer than k draws say nothing of k draws: dropped and counted
    in `n_dropped` (flag `dropped`), NaN with the flag `empty` if that is all of them. Not what a user gets who cannot
    tell a right answer from a wrong one: for that see `maj_at_k` and `best_of_k`."""
    return _over_items(correct, total, k, pass_at_k_of_item, on_invalid)


def pass_hat_k(correct: ArrayLike, total: ArrayLike, k: int, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean over items of `pass_hat_k_of_item` (all of k draws right: reliability), otherwise as `pass_at_k`."""
    return _over_items(correct, total, k, pass_hat_k_of_item, on_invalid)


def best_of_k(
    scores: Sequence[ArrayLike], correct: Sequence[ArrayLike], k: int, *, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Expected correctness of the best-scored of k draws out of n, without drawing (best-of-n by a reward):

        sum_i C(i - 1, k - 1) / C(n, k) y_(i),  y_(1), ..., y_(n) in order of rising score,

    with y averaged over tied scores. scores[i], correct[i]: the n_i draws of item i (a flat sequence is one item);
    mean and interval over items as `pass_at_k`. A score that is not finite raises, or drops its item: a draw without
    a score cannot be ranked. Items with fewer than k draws are dropped and counted."""
    k = whole("k", k)
    score, right = ragged("scores", as_items(scores)), ragged("correct", as_items(correct))
    same_sizes("scores", score.size, "correct", right.size)
    draws = Column("scores", score.flat, "finite"), Column("correct", right.flat, "unit")
    clean(*draws, on_invalid=on_invalid)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(score.flat) & (right.flat >= 0) & (right.flat <= 1)
    expected = _rank_weights(score, k) * _tie_means(score, right.flat)
    values = group_sums(score.item, expected, len(score.size))
    values[score.size < k] = np.nan
    values[spoilt(score, good)] = np.nan
    return over_items(values)


def over_items(values: Array) -> Estimate:
    """Mean and interval over items of values in [0, 1] (up to rounding). NaN items (fewer than k draws, no score) are
    dropped and counted, and the flag `dropped` says that the mean is over other items than were given."""
    estimate = share_interval(np.clip(values, 0.0, 1.0), on_invalid="drop")
    short = estimate.n_dropped > 0 and estimate.n > 0
    return replace(estimate, flags=(*estimate.flags, "dropped")) if short else estimate


def _rank_weights(score: Ragged, k: int) -> Array:
    """[N]: C(r - 1, k - 1) / C(n, k) for the draw that stands r-th of n in its item, by the recursion w_n =
    k / n, w_{r-1} = w_r (r - k) / (r - 1)."""
    weights = np.zeros(len(score.flat))
    order = np.lexsort((score.flat, score.item))
    for n in np.unique(score.size):
        rank = np.arange(n, 1, -1)
        table = (
            np.cumprod(np.concatenate([[k / n], np.maximum(rank - k, 0) / (rank - 1)]))[::-1]
            if n >= k
            else np.zeros(n)
        )
        mine = np.repeat(score.size == n, score.size)
        weights[mine] = np.tile(table, int((score.size == n).sum()))
    placed = np.empty_like(weights)
    placed[order] = weights
    return placed


def _tie_means(score: Ragged, right: Array) -> Array:
    """[N]: mean correctness of the draws of the same item with the same score."""
    order = np.lexsort((score.flat, score.item))
    item, value = score.item[order], score.flat[order]
    new = np.ones(len(value), dtype=bool)
    new[1:] = (item[1:] != item[:-1]) | (value[1:] != value[:-1])
    group = np.empty(len(value), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    groups = int(new.sum())
    return (group_sums(group, right, groups) / np.bincount(group, minlength=groups))[group]


def _over_items(
    correct: ArrayLike,
    total: ArrayLike,
    k: int,
    of_item: Callable[[int, int, int], float],
    on_invalid: OnInvalid,
) -> Estimate:
    columns = Column("correct", correct, "finite"), Column("total", total, "finite")
    [c, n], dropped = clean(*columns, on_invalid=on_invalid)
    pairs, inverse = np.unique(np.stack([n, c], axis=1), axis=0, return_inverse=True)
    values = [of_item(whole("total", a, 0), whole("correct", b, 0), k) for a, b in pairs]
    estimate = over_items(np.array(values, dtype=float)[inverse.ravel()])
    return replace(estimate, n_dropped=estimate.n_dropped + dropped)


def _check_counts(n: int, correct: int, k: int) -> None:
    if not 0 <= correct <= n:
        raise UserError(f"{correct} right of {n} samples; give the right ones first, then all of them")
    whole("k", k)
