"""Masks on ranks: whole rank-one parts of each layer's update are dropped; a draw is an adapter of lower rank."""

from __future__ import annotations

from dataclasses import dataclass

from ..job import FitReport, Job
from ..posterior import Posterior
from .dropout import check_probability, fit_fixed


@dataclass(frozen=True)
class RankMasks:
    """p: probability that a rank is dropped; those left are multiplied by 1 / (1 - p).

        y = W x + s / (1 - p) sum_i z_i B_:i (A_i: x),   z_i ~ Bernoulli(1 - p)

    r numbers a layer and draw: coarse, so draws differ more than under column masks of the same p. `ConcreteDropout`
    with axis "ranks" learns p. When not to use it: at rank 1 or 2, where a draw loses all or half of a layer.
    """

    p: float = 0.25

    def __post_init__(self) -> None:
        check_probability("p", self.p)

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        return fit_fixed(job, "rank_masks", self.p, "ranks")
