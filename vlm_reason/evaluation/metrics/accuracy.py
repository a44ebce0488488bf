"""Share of right answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ...errors import UserError
from ...stats import Labels, OnInvalid, clustered_share, factorise, wilson
from ...types import Estimate
from .inputs import Column, clean


def accuracy(correct: ArrayLike, items: Labels | None = None, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """mean(correct), correct [N] in [0, 1]; `n` counts samples.

    One 0/1 sample an item (or no `items`: every value its own): Wilson's interval, so that 30 of 30 is [0.886, 1] and
    never of width 0. Otherwise `items` [N] names the item of every sample and the item is the cluster, because
    samples of one item are not independent (Miller 2024, arXiv 2411.00640): see `stats.clustered_share`. An answer
    that could not be read is a 0 here, not a gap. Not for comparing two systems: use `compare`, which pairs them.
    """
    [values], dropped = clean(Column("correct", correct, "unit"), on_invalid=on_invalid)
    raw = np.asarray(correct, dtype=float).ravel()
    if items is not None and len(items) != len(raw):
        raise UserError(f"{len(raw)} values of correct but {len(items)} items; give the item of every value")
    codes, count = (np.arange(len(raw)), len(raw)) if items is None else factorise(items)
    if count == len(raw) and bool(np.isin(values, (0, 1)).all()):
        return replace(wilson(values), n_dropped=dropped)
    with np.errstate(invalid="ignore"):
        kept = (raw >= 0) & (raw <= 1)
    return replace(clustered_share(values, codes[kept]), n_dropped=dropped)
