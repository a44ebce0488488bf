"""Variational Bayesian last layers (Harrison, Willes and Snoek 2024): the mathematics, on features as plain tensors.

head, fitted = fit_head(RewardTask(), Data(phi_preferred - phi_rejected, offset, target), HeadSettings())
mean, variance = head.moments(phi)
"""

from .covariance import STRUCTURES, Covariance, Diagonal, Full, LowRank
from .density import FeatureDensity, fit_density
from .features import PROJECTIONS, FeatureMap, make_map, rms_normed
from .fit import Data, Fitted, HeadSettings, elbo, fit_head
from .gaussian import Head
from .tasks import ClassificationTask, RegressionTask, RewardTask, Task

__all__ = [
    "PROJECTIONS", "STRUCTURES", "ClassificationTask", "Covariance", "Data", "Diagonal", "FeatureDensity",
    "FeatureMap", "Fitted", "Full", "Head", "HeadSettings", "LowRank", "RegressionTask", "RewardTask", "Task", "elbo",
    "fit_density", "fit_head", "make_map", "rms_normed",
]  # fmt: skip
