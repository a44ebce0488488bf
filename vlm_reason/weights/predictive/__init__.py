"""What a posterior predicts: S draws averaged, with the uncertainty split into what the data leave open and noise."""

from .predict import MODES, predictive
from .result import Predictive

__all__ = ["MODES", "Predictive", "predictive"]
