"""Laplace's approximation on a trained adapter (Laplace-LoRA, Yang et al. 2024, arXiv 2308.13111).

    q(theta) = N(theta*, P^-1),    P = H / T + delta 1,    H = sum_n J_n^T Lambda_n J_n

H: the generalised Gauss-Newton matrix at theta*, over all N examples, in eval mode (curvature/). delta: the prior's
precision, by the marginal likelihood unless told otherwise (curvature/evidence.py).

H belongs to the linearised model, which mode="linearised" predicts with; draws put through the network itself may
leave the region in which it is one. Compare the two on held-out data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import UserError
from ..curvature import DiagonalCurvature, FullCurvature, KroneckerCurvature
from ..curvature.accumulators import Factors, Over
from ..curvature.shapes import DiagonalShape, FullShape, KroneckerShape
from ..job import FitReport, Job
from ..posterior import Posterior
from .post_hoc import GRID, Groups, Prior, Settings, fit_post_hoc

Structure = Literal["diagonal", "kronecker", "full"]


@dataclass(frozen=True)
class Laplace:
    """structure  diagonal: P numbers, ignores correlations; kronecker: a matrix apart, its large side of rank `rank`
                  (rank >= width: the plain Kronecker product); full: for adapters of at most `largest_full` weights
    factors       of kronecker: gradients or activations, see KroneckerCurvature
    over          which of the LoRA factors are uncertain: both, A or B
    prior         evidence: delta of highest marginal likelihood, one for each of `groups`; held_out: of the `grid`
                  the delta of lowest negative log-likelihood of job.held_out (linearised); fixed: `prior_precision`;
                  start: job.start, a diagonal Gaussian, is the prior, mean and precision (diagonal and full)
    groups        global; kind: all A, all B; tensor: each by itself
    temperature   T; below 1 is colder
    samples       0: the exact H, C - 1 backward passes for C classes; K: labels drawn from the model's predictions
    train         train by job.training first; None: only where the adapter is untrained (every B is zero)
    tokens        of a batch of the curvature pass, padding included

    Plain LoRA factors of linear layers are uncertain, other tensors of the adapter certain. The report's details have
    log_evidence (nats), prior_precision by group, and what the curvature cost; held_out_nll is that of the linearised
    model. UserError for settings out of range, a full covariance above `largest_full`
    weights, and a token likelihood without `samples`.
    """

    structure: Structure = "kronecker"
    rank: int = 10
    factors: Factors = "gradients"
    over: Over = "both"
    prior: Prior = "evidence"
    prior_precision: float = 1.0
    groups: Groups = "global"
    grid: tuple[float, ...] = GRID
    temperature: float = 1.0
    samples: int = 0
    train: bool | None = None
    tokens: int = 2048
    largest_full: int = 4096

    def __post_init__(self) -> None:
        for name, allowed in (
            ("structure", ("diagonal", "kronecker", "full")),
            ("factors", ("gradients", "activations")),
            ("over", ("both", "A", "B")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("rank", "largest_full"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        self._settings()

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        settings = self._settings()
        if self.structure == "diagonal":
            return fit_post_hoc(job, "laplace", settings, DiagonalCurvature(self.over), DiagonalShape)
        if self.structure == "full":
            return fit_post_hoc(
                job, "laplace", settings, FullCurvature(self.over, self.largest_full), FullShape
            )
        curvature = KroneckerCurvature(self.rank, self.factors, self.over)
        return fit_post_hoc(job, "laplace", settings, curvature, KroneckerShape)

    def _settings(self) -> Settings:
        return Settings(
            self.prior, self.prior_precision, self.groups, self.grid, self.temperature, self.samples, self.train,
            self.tokens,
        )  # fmt: skip
