"""Compare ways of fitting a posterior over one adapter: the same data, seeds and test problems for every method."""

from .config import WeightSuite
from .run import run_weight_suite

__all__ = ["WeightSuite", "run_weight_suite"]
