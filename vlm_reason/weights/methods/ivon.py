"""IVON as a method: the diagonal Gaussian that the optimiser of weights/ivon.py learns, with settings that follow from
the length of the run and the size of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from torch import nn

from ...errors import UserError
from ..continual import prior_loss, start_from
from ..held_out import held_out_nll
from ..ivon import IVON as Optimizer
from ..job import FitReport, Job
from ..posterior import Posterior
from ..settings import diagnose, suggest_settings
from ..training import train


@dataclass(frozen=True)
class IVON:
    """sigma         initial standard deviation of every weight
    temperature   N / lambda: 1 is the Bayesian posterior, below it is colder
    weight_decay  delta; the prior is N(0, temperature / (N delta))
    mc_samples    K draws an update; the run then has 1 / K of the updates
    clip_radius   xi, of the preconditioned step; null: the one with which no weight moves further than
                  training.learning_rate in an update
    lr            alpha, times h_0 + delta
    draws         of the predictive that the report scores held-out data by
    start         adapter: from the adapter as it is; map: train as `map` does first, begin at what it finds

    prior         zero: N(0, temperature / (N delta)); start: job.start, mean and precision, and no weight decay
                  (continual.py)

    job.start, where there is one, says where to begin. When not to use it: see `vlm_reason.weights.IVON`.
    """

    sigma: float = 0.01
    temperature: float = 1.0
    weight_decay: float = 1e-4
    mc_samples: int = 1
    clip_radius: float | None = None
    lr: float = 1.0
    draws: int = 10
    start: Literal["adapter", "map"] = "adapter"
    prior: Literal["zero", "start"] = "zero"

    def __post_init__(self) -> None:
        for name in ("mc_samples", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"ivon: {name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"ivon: lr must be > 0, got {self.lr}")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        start_from(job)
        loss = prior_loss(job, self.prior)
        seconds, steps = 0.0, 0
        if self.start == "map":
            first = train(job, loss=loss, name="map", method="prior start" if self.prior == "start" else None)
            seconds, steps = first.seconds, first.steps
        trained = train(
            job,
            loss=loss,
            make_optimizer=lambda parameters, n: self.optimizer(job, parameters, n),
            name="ivon",
            method=self,
        )
        optimizer = trained.optimizer
        assert isinstance(optimizer, Optimizer)
        posterior = Posterior.from_optimizer(optimizer, job.model, job.adapter)
        posterior.write(job.model, posterior.mean(), job.adapter)
        return posterior, FitReport(
            "ivon", posterior.family, len(job.train), steps + trained.steps, seconds + trained.seconds,
            trained.final_loss, held_out_nll(posterior, job, self.draws), asdict(diagnose(optimizer)),
        )  # fmt: skip

    def optimizer(self, job: Job, parameters: Sequence[nn.Parameter], steps: int) -> Optimizer:
        if self.mc_samples > steps:
            raise UserError(
                f"options.mc_samples is {self.mc_samples}, the run has {steps} steps: nothing would ever be updated"
            )
        updates = steps // self.mc_samples
        decay = self.weight_decay if self.prior == "zero" else 0.0
        auto = suggest_settings(updates, len(job.train), self.sigma, self.temperature, decay)
        scale = self.lr * (auto.hess_init + decay)
        radius = job.training.learning_rate / scale if self.clip_radius is None else self.clip_radius
        return Optimizer(
            list(parameters), self.lr, auto.ess, auto.hess_init, beta2=auto.beta2, weight_decay=decay,
            clip_radius=radius, mc_samples=self.mc_samples, seed=job.seed, horizon=auto.horizon,
            data_size=auto.data_size,
        )  # fmt: skip


__all__ = ["IVON"]
