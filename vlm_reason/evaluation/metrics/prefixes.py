"""Sums over the least uncertain items, tie group by tie group, of many resamples at once.

A tie group of m items with losses summing to S, behind N items that lost L, contributes the expected prefixes
L + j S/m, j = 1..m. Every area below has a closed form in (m, S, N, L), so a resample costs one step a group, not one
an item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .inputs import Array

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Prefixes:
    """Tie groups in order of rising uncertainty, [resamples, groups]: size m, mean loss, and the items and the loss
    before the group. base [resamples] is the mean loss of all."""

    size: Array
    mean: Array
    items_before: Array
    loss_before: Array

    @property
    def n(self) -> Array:
        return self.items_before[:, -1] + self.size[:, -1]

    @property
    def base(self) -> Array:
        return (self.loss_before[:, -1] + self.size[:, -1] * self.mean[:, -1]) / self.n


def prefixes(key: Array, loss: Array, weight: Array) -> Prefixes:
    """The groups of equal `key`. key, loss [A]: kinds of items; weight [resamples, A]: how many there are of each."""
    order = np.argsort(key, kind="stable")
    start = np.flatnonzero(np.diff(key[order], prepend=np.nan) != 0)
    weight = weight[:, order]
    size = np.add.reduceat(weight, start, axis=1)
    total = np.add.reduceat(weight * loss[order], start, axis=1)
    items, losses = np.cumsum(size, axis=1), np.cumsum(total, axis=1)
    return Prefixes(size, total / np.maximum(size, 1), items - size, losses - total)


def area_of_means(p: Prefixes) -> Array:
    """(1/n) sum_i L_i / i. Over a group, sum_j (L + j s) / (N + j) = m s + (L - s N) (H(N + m) - H(N)), with s the mean
    loss and H the harmonic numbers."""
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(p.n.max()) + 1))])
    before = p.items_before.astype(np.int64)
    inner = harmonic[before + p.size.astype(np.int64)] - harmonic[before]
    group = p.size * p.mean + (p.loss_before - p.mean * p.items_before) * inner
    return group.sum(axis=1) / p.n


def area_of_sums(p: Prefixes) -> Array:
    """(1/n) sum_i L_i / n. Over a group, sum_j (L + j s) = m L + s m (m + 1) / 2."""
    group = p.size * p.loss_before + p.mean * p.size * (p.size + 1) / 2
    return group.sum(axis=1) / p.n**2


def risk_at(p: Prefixes, coverage: float) -> Array:
    """L_i / i at i = ceil(coverage n)."""
    i = np.maximum(np.ceil(p.n * coverage - 1e-9), 1.0)
    group = np.argmax(p.items_before + p.size >= i[:, None], axis=1)
    row = np.arange(len(i))
    loss = p.loss_before[row, group] + p.mean[row, group] * (i - p.items_before[row, group])
    return loss / i


def coverage_within(p: Prefixes, risk: float) -> Array:
    """Largest i/n with L_i <= risk i; 0 if there is none. Within a group L_i - risk i is a straight line in j: if the
    whole group fits it is j = m, else, where the line rises, the last j below its root."""
    room = risk * p.items_before - p.loss_before
    slope = p.mean - risk
    tolerance = _ROUNDING * np.maximum(p.n, 1)[:, None] * max(1.0, abs(risk))
    whole = p.size * slope <= room + tolerance
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(slope > 0, np.floor((room + tolerance) / np.where(slope > 0, slope, 1.0)), 0.0)
    j = np.where(whole, p.size, np.clip(part, 0.0, p.size))
    return np.where(j > 0, p.items_before + j, 0.0).max(axis=1) / p.n
