"""Share of right answers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ...stats import clustered_share, wilson
from ...types import Estimate


def accuracy(correct: ArrayLike, items: Sequence[Hashable] | None = None) -> Estimate:
    """mean(correct). One 0/1 sample an item: Wilson interval. Otherwise the item is the cluster (several
    samples of one item are not independent): see `stats.clustered`. `n` counts samples. Without `items`
    every value is its own item."""
    values = np.asarray(correct, dtype=float).ravel()
    labels = range(len(values)) if items is None else items
    once = len(set(labels)) == len(labels)
    return (
        wilson(values)
        if once and bool(np.isin(values, (0, 1)).all())
        else clustered_share(values, list(labels))
    )
