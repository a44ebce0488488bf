"""Curvature of the log-likelihood in an adapter's weights: the generalised Gauss-Newton matrix, in several shapes.

    H = sum_n J_n^T Lambda_n J_n,    J_n = d f_n / d theta,    Lambda_n = -d^2 log p(y | f_n) / d f_n^2

A sum over all N examples, never a mean over a batch. Accumulators are additive: one for each part of the data, on
whichever machine, and `merge`.
"""

from .accumulators import Accumulator, CoreCurvature, DiagonalCurvature, FullCurvature, KroneckerCurvature
from .collect import collect
from .low_rank import LowRank

__all__ = [
    "Accumulator",
    "CoreCurvature",
    "DiagonalCurvature",
    "FullCurvature",
    "KroneckerCurvature",
    "LowRank",
    "collect",
]
