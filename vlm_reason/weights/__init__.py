"""Uncertainty of weights: methods that learn a posterior over an adapter, families of posteriors, their predictions."""

from .callback import IVONCallback
from .examples import Batch, Choices, Example, choice_examples, in_batches, make_batch
from .families import FAMILIES
from .families.diagonal import DiagonalGaussian
from .ivon import IVON
from .job import FitReport, Job, Training
from .likelihoods import BradleyTerry, Choice, Likelihood, Regression, Tokens
from .loo import LeaveOneOut, best_checkpoint
from .merging import MergeReport, merge
from .methods import METHODS
from .posterior import Origin, Posterior
from .predictive import Predictive
from .settings import Diagnostics, Settings, diagnose, suggest_settings

__all__ = [
    "FAMILIES", "IVON", "METHODS", "Batch", "BradleyTerry", "Choice", "Choices", "Diagnostics", "DiagonalGaussian",
    "Example", "FitReport", "IVONCallback", "Job", "LeaveOneOut", "Likelihood", "MergeReport", "Origin",
    "Posterior", "Predictive", "Regression", "Settings", "Tokens", "Training", "best_checkpoint", "choice_examples",
    "diagnose", "in_batches", "make_batch", "merge", "suggest_settings",
]  # fmt: skip
