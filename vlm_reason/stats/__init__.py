"""Numbers that carry their uncertainty: intervals for one mean, and the paired comparison of two systems."""

from .intervals import OnInvalid, clustered, clustered_share, mean_interval, wilson
from .paired import PairedEstimate, holm, minimum_detectable_effect, paired_difference

__all__ = [
    "OnInvalid",
    "PairedEstimate",
    "clustered",
    "clustered_share",
    "holm",
    "mean_interval",
    "minimum_detectable_effect",
    "paired_difference",
    "wilson",
]
