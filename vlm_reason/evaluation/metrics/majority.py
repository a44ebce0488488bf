"""P(the majority of k of n samples is right), without listing the subsets where that can be helped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from .answers import UNREAD, Classes, Sampled
from .inputs import Array

EXACT_SAMPLES = 128
ENUMERATED = 20_000
SUBSETS = 2_000
_ALL_SUBSETS = 2_000_000
_ALL_DRAWS = 200_000_000
_BLOCK = 4_000_000


def expected_majority(samples: Sampled, found: Classes, right: Array, k: int, seed: int = 0) -> Array:
    """[n items]: the unweighted value, NaN where an item has fewer than k samples. right [C] in [0, 1].

    It depends only on the pattern of the votes (votes for each answer, which of them are right, abstentions), so
    every distinct pattern is worked out once."""
    values = np.full(len(samples.size), np.nan)
    votes = np.bincount(found.item, weights=found.count, minlength=len(samples.size)).astype(np.int64)
    for n in np.unique(samples.size):
        items = np.flatnonzero(samples.size == n)
        if n < k:
            continue
        count, good = _patterns(found, right, items)
        both = np.concatenate([count, good, (n - votes[items])[:, None]], axis=1)
        pattern, inverse = _distinct_rows(both)
        m = count.shape[1]
        count, good, silent = (
            pattern[:, :m].astype(np.int64),
            pattern[:, m : 2 * m],
            pattern[:, -1].astype(np.int64),
        )
        if k == n:
            found_values = _winners(count[:, None, :], good)
        elif n <= EXACT_SAMPLES:
            found_values = _exact(count, good, silent, int(n), k)
        else:
            found_values = _drawn(count, good, silent, k, np.random.default_rng([seed, int(n), k]))
        values[items] = found_values[inverse]
    return values


def expected_weighted(
    samples: Sampled, found: Classes, right: Array, weight: Array, k: int, seed: int = 0
) -> Array:
    """[n items]: the weighted value, over all subsets or over seeded ones. weight [N] >= 0."""
    values = np.full(len(samples.size), np.nan)
    start = np.cumsum(samples.size) - samples.size
    classes_before = np.searchsorted(found.item, np.arange(len(samples.size)))
    for n in np.unique(samples.size):
        items = np.flatnonzero(samples.size == n)
        if n < k:
            continue
        chosen = _subsets(int(n), k, len(items), np.random.default_rng([seed, int(n), k]))
        _, good = _patterns(found, right, items, by_votes=False)
        width = max(good.shape[1], 1)
        for block in _blocks(items, len(chosen) * width):
            rows = start[block][:, None] + np.arange(n)
            local = found.of_sample[rows] - classes_before[block][:, None]
            local[found.of_sample[rows] == UNREAD] = UNREAD
            ballots = (local[:, :, None] == np.arange(width)) * weight[rows][:, :, None]
            _, value = _patterns(found, right, block, by_votes=False, width=width)
            values[block] = _winners(np.einsum("sn,inm->ism", chosen, ballots, optimize=True), value)
    return values


def _patterns(
    found: Classes, right: Array, items: NDArray[np.int64], by_votes: bool = True, width: int | None = None
) -> tuple[NDArray[np.int64], Array]:
    """Votes and rightness of the classes of `items`, [items, most classes], filled up with classes of no votes. The
    most votes come first, so that equal patterns are equal rows."""
    place = np.full(int(max(found.item.max(initial=-1), items.max(initial=-1))) + 1, -1)
    place[items] = np.arange(len(items))
    mine = np.flatnonzero(place[found.item] >= 0)
    if by_votes:
        mine = mine[np.lexsort((-right[mine], -found.count[mine], found.item[mine]))]
    row = place[found.item[mine]]
    first = np.flatnonzero(np.diff(found.item[mine], prepend=-1))
    column = np.arange(len(mine)) - np.repeat(first, np.diff(np.append(first, len(mine))))
    shape = (len(items), width or int(column.max(initial=0)) + 1)
    count, good = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    count[row, column], good[row, column] = found.count[mine], right[mine]
    return count, good


def _distinct_rows(rows: Array) -> tuple[Array, NDArray[np.int64]]:
    """The distinct rows, and which of them every row is (`np.unique` with an axis, ten times as fast)."""
    order = np.lexsort(rows.T)
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (rows[order[1:]] != rows[order[:-1]]).any(axis=1)
    inverse = np.empty(len(rows), dtype=np.int64)
    inverse[order] = np.cumsum(new) - 1
    return rows[order[new]], inverse


def _exact(count: NDArray[np.int64], good: Array, silent: NDArray[np.int64], n: int, k: int) -> Array:
    """[patterns]: sum over right classes of P(wins) by a generating function. count, good [patterns, classes],
    silent [patterns].

    A random subset of size k is n coins of p = k/n given that k of them show heads. Class j of c_j votes wins with t
    heads, sharing with s others, with probability 1/(s + 1) = integral_0^1 x^s dx: so for every t

        Bin(t; c_j) [z^(k-t)] integral prod_{i != j} ( sum_{u<t} Bin(u; c_i) z^u + x Bin(t; c_i) z^t ) dx / Bin(k; n),

    and Gauss-Legendre nodes integrate the polynomial in x exactly. Classes that cannot reach t are pooled with the
    abstentions, which no one restrains."""
    values = np.zeros(len(count))
    which, column = np.nonzero(good * (count > 0))
    own = count[which, column]
    others = count[which].copy()
    others[np.arange(len(which)), column] = 0
    others = -np.sort(-others, axis=1)
    p = k / n
    for t in range(1, min(k, int(own.max(initial=0))) + 1):
        for part in _blocks(np.flatnonzero(own >= t), (k - t + 1) * (k // t + 1)):
            chance = _held_to(others[part], silent[which[part]], t, k, p)
            won = binom.pmf(t, own[part], p) * chance / binom.pmf(k, n, p)
            np.add.at(values, which[part], good[which[part], column[part]] * won)
    return values


def _held_to(others: NDArray[np.int64], silent: NDArray[np.int64], t: int, k: int, p: float) -> Array:
    """[rows]: the integral of the product over the other classes (sorted, most votes first) at z^(k-t)."""
    nodes, node_weights = np.polynomial.legendre.leggauss(max(1, (k // t + 1) // 2))
    x = (nodes + 1) / 2
    free = silent + np.where(others < t, others, 0).sum(axis=1)
    heads = np.arange(k - t + 1)
    poly = np.repeat(binom.pmf(heads, free[:, None], p)[:, None, :], len(x), axis=1)
    for i in range(others.shape[1]):
        live = np.flatnonzero(others[:, i] >= t)
        if not len(live):
            break
        factor = binom.pmf(np.arange(t + 1), others[live, i][:, None], p)
        before, after = poly[live], np.zeros((len(live), *poly.shape[1:]))
        for u in range(min(t, k - t) + 1):
            scale = factor[:, u, None, None] * (x[:, None] if u == t else 1.0)
            after[:, :, u:] += scale * before[:, :, : k - t + 1 - u]
        poly[live] = after
    return poly[:, :, -1] @ node_weights / 2


def _drawn(
    count: NDArray[np.int64], good: Array, silent: NDArray[np.int64], k: int, rng: np.random.Generator
) -> Array:
    """[patterns]: over SUBSETS random subsets, the same places for all patterns; fewer where that would be more than
    200 million draws, but at least 50."""
    n, width = int(count[0].sum() + silent[0]), count.shape[1] + 1
    number = int(np.clip(_ALL_DRAWS // (k * len(count)), 50, SUBSETS))
    picks = rng.permuted(np.tile(np.arange(n), (number, 1)), axis=1)[:, :k]
    values = np.empty(len(count))
    for i, (votes, value, rest) in enumerate(zip(count, good, silent, strict=True)):
        of_place = np.repeat(np.arange(width), [*votes, rest])
        key = of_place[picks] + width * np.arange(number)[:, None]
        drawn = np.bincount(key.ravel(), minlength=number * width).reshape(1, number, width)[:, :, :-1]
        values[i] = _winners(drawn, value[None])[0]
    return values


def _subsets(n: int, k: int, items: int, rng: np.random.Generator) -> Array:
    """[subsets, n] of 0 and 1: every subset of size k, or seeded ones (the same for all items: their samples are
    independent)."""
    if math.comb(n, k) <= ENUMERATED:
        picks = np.array(list(combinations(range(n), k)), dtype=np.int64).reshape(-1, k)
    else:
        number = int(np.clip(_ALL_SUBSETS // items, 50, SUBSETS))
        picks = rng.permuted(np.tile(np.arange(n), (number, 1)), axis=1)[:, :k]
    chosen = np.zeros((len(picks), n))
    np.put_along_axis(chosen, picks, 1.0, axis=1)
    return chosen


def _winners(votes: Array | NDArray[np.int64], value: Array) -> Array:
    """[items]: mean over subsets of the value of the winners, ties split evenly. votes [items, subsets, classes],
    value [items, classes]. Sums of weights that differ by rounding alone are equal."""
    top = votes.max(axis=2, keepdims=True)
    winner = (votes >= top * (1 - 1e-12)) & (top > 0)
    share = (winner * value[:, None, :]).sum(axis=2) / np.maximum(winner.sum(axis=2), 1)
    return share.mean(axis=1)


def _blocks(rows: NDArray[np.int64], cost: int) -> Iterator[NDArray[np.int64]]:
    """Rows in blocks whose temporaries, `cost` numbers a row, stay small."""
    size = max(1, _BLOCK // max(cost, 1))
    return (rows[i : i + size] for i in range(0, len(rows), size))
