"""Numbers that carry their uncertainty: intervals for one mean, the bootstrap over items, and the paired
comparison of two systems."""

from .intervals import (
    Labels,
    OnInvalid,
    clustered,
    clustered_share,
    empty,
    factorise,
    mean_interval,
    share_interval,
    wilson,
)
from .paired import PairedEstimate, holm, minimum_detectable_effect, paired_difference, paired_values
from .resample import RESAMPLES, Cells, cells, equal_mass, group_sums, in_blocks, resample, summarise

__all__ = [
    "RESAMPLES",
    "Cells",
    "Labels",
    "OnInvalid",
    "PairedEstimate",
    "cells",
    "clustered",
    "clustered_share",
    "empty",
    "equal_mass",
    "factorise",
    "group_sums",
    "holm",
    "in_blocks",
    "mean_interval",
    "minimum_detectable_effect",
    "paired_difference",
    "paired_values",
    "resample",
    "share_interval",
    "summarise",
    "wilson",
]
