"""Laplace's approximation in the coordinates of an r x r core of every layer: Delta W = s B R A, at R = 1.

    vec(R) ~ N(vec(1), P^-1),    P = H_R / T + delta 1  [r^2, r^2],    H_R = sum_n J_R^T Lambda_n J_R

The cheapest full covariance: r^4 numbers a layer, and its gradient needs neither side's width. The prior is
N(0, 1 / delta) on R; delta by the marginal likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..curvature import CoreCurvature
from ..curvature.shapes import CoreShape
from ..job import FitReport, Job
from ..posterior import Posterior
from .post_hoc import GRID, Groups, Prior, Settings, fit_post_hoc


@dataclass(frozen=True)
class Core:
    """Settings as `Laplace` has them; `groups: kind` is `global` here. A posterior as the prior is not supported.

    When not to use it: rank above 32 (r^4 numbers a layer), or an adapter that has hardly been trained.
    """

    prior: Prior = "evidence"
    prior_precision: float = 1.0
    groups: Groups = "global"
    grid: tuple[float, ...] = GRID
    temperature: float = 1.0
    samples: int = 0
    train: bool | None = None
    tokens: int = 2048

    def __post_init__(self) -> None:
        self._settings()

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        return fit_post_hoc(job, "core", self._settings(), CoreCurvature(), CoreShape)

    def _settings(self) -> Settings:
        return Settings(
            self.prior, self.prior_precision, self.groups, self.grid, self.temperature, self.samples, self.train,
            self.tokens,
        )  # fmt: skip
