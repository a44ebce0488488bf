"""Uncertainty of weights: an optimiser that learns a Gaussian over them."""

from .ivon import IVON
from .settings import Diagnostics, Settings, diagnose, suggest_settings

__all__ = ["IVON", "Diagnostics", "Settings", "diagnose", "suggest_settings"]
