"""Uncertainty of weights: an optimiser that learns a Gaussian over them, and posteriors over adapters."""

from .diagonal import DiagonalGaussian
from .ivon import IVON
from .posterior import Origin, Posterior
from .settings import Diagnostics, Settings, diagnose, suggest_settings

FAMILIES: dict[str, type[Posterior]] = {DiagonalGaussian.family: DiagonalGaussian}
"""Name -> class of every family of posteriors there is."""

__all__ = [
    "FAMILIES", "IVON", "Diagnostics", "DiagonalGaussian", "Origin", "Posterior", "Settings", "diagnose",
    "suggest_settings",
]  # fmt: skip
