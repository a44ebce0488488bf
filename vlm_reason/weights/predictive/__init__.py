"""What a posterior predicts: S draws averaged, with the uncertainty split into what the data leave open and noise."""

from .generate import Generated, generate
from .predict import MODES, predictive
from .result import Predictive

__all__ = ["MODES", "Generated", "Predictive", "generate", "predictive"]
