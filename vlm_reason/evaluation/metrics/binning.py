"""Confidence bins, and the sums in them that every calibration error is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError, nearest
from ...stats import Cells, cells, equal_mass, group_sums
from .inputs import Array, whole

Scheme = Literal["width", "mass"]


@dataclass(frozen=True)
class Bins:
    """edges [B + 1]; bin b is (edges[b], edges[b + 1]], the first one closed on both sides. of [n]: the bin of every
    item."""

    edges: Array
    of: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.edges) - 1


def make_bins(confidence: Array, bins: int, scheme: Scheme) -> Bins:
    """width: B bins of width 1/B, right-closed, so 1.0 lies in the last and 0 in the first. mass: bins of about n/B
    items that never split equal confidences; see `mass_groups`."""
    bins = whole("bins", bins)
    if scheme == "width":
        edges = np.arange(bins + 1) / bins
        return Bins(edges, np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1))
    if scheme != "mass":
        raise UserError(f"unknown binning scheme {scheme!r}{nearest(str(scheme), ('width', 'mass'))}")
    group = mass_groups(confidence, bins)
    count = int(group.max(initial=-1)) + 1
    highest = np.zeros(count)
    np.maximum.at(highest, group, confidence)
    return Bins(np.concatenate([[0.0], highest[:-1], [1.0]]), group)


def mass_groups(values: Array, bins: int) -> NDArray[np.int64]:
    """[n]: bins of equal mass in which equal values stay together. With at most B distinct values each is its own
    bin. A value that at least n/B items share is its own bin, and each stretch between two such values is cut by rank
    into its share of the bins that are left, at least one: where ties cut the range in many places, there can be a
    few more bins than B."""
    distinct, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    inverse = inverse.ravel()
    if len(distinct) <= bins:
        return inverse.astype(np.int64)
    large = count * bins >= len(values)
    stretch = np.cumsum(large) * 2 - large  # odd: a large value; even: the stretch before the next one
    rest = len(values) - int(count[large].sum())
    left = max(bins - int(large.sum()), 1)
    code = np.zeros(len(distinct), dtype=np.int64)
    for s in np.unique(stretch[~large]):
        mine = np.flatnonzero((stretch == s) & ~large)
        mass = count[mine]
        pieces = max(1, round(left * int(mass.sum()) / rest))
        middle = np.cumsum(mass) - mass / 2
        code[mine] = np.floor(middle * pieces / mass.sum())
    _, packed = np.unique(np.stack([stretch, code], axis=1), axis=0, return_inverse=True)
    return packed.ravel()[inverse].astype(np.int64)


@dataclass(frozen=True)
class BinSums:
    """n_b, sum of correctness and sum of confidence, each [..., B]; leading axes are resamples."""

    n: Array
    right: Array
    conf: Array

    @property
    def gap(self) -> Array:
        """acc_b - conf_b, 0 where the bin is empty."""
        return (self.right - self.conf) / np.maximum(self.n, 1)


def bin_sums(bins: Bins, confidence: Array, correct: Array) -> BinSums:
    b = len(bins)
    return BinSums(
        np.bincount(bins.of, minlength=b).astype(float),
        group_sums(bins.of, correct, b),
        group_sums(bins.of, confidence, b),
    )


def bin_cells(bins: Bins, confidence: Array, correct: Array) -> tuple[Cells, Array]:
    """Items that are alike in confidence and correctness, and [A, B] which bin each kind lies in."""
    found = cells(confidence, correct)
    return found, _one_hot(bins, found.x)


def null_cells(bins: Bins, confidence: Array, most: int = 2048) -> tuple[Cells, Array]:
    """Items that are alike in confidence alone; when there are more than `most`, neighbours in one bin."""
    distinct, count = np.unique(confidence, return_counts=True)
    if len(distinct) > most:
        joint = bins.of * (most + 1) + equal_mass(confidence, most)
        _, group, count = np.unique(joint, return_inverse=True, return_counts=True)
        distinct = group_sums(group.ravel(), confidence, len(count)) / count
    return Cells(distinct, np.zeros(len(distinct)), count), _one_hot(bins, distinct)


def _one_hot(bins: Bins, confidence: Array) -> Array:
    of = np.clip(np.searchsorted(bins.edges, confidence, side="left") - 1, 0, len(bins) - 1)
    return (of[:, None] == np.arange(len(bins))).astype(float)
