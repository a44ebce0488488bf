"""Maximum a posteriori: one adapter, no uncertainty in the weights. The baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict
from ..continual import prior_loss, start_from
from ..families.diagonal import DiagonalGaussian
from ..held_out import held_out_nll
from ..job import FitReport, Job
from ..posterior import Origin, Posterior
from ..training import train


@dataclass(frozen=True)
class MAP:
    """Plain training with `training.weight_decay`; the posterior is a point mass.

    prior: flat, or start: job.start is the prior, mean and precision (continual.py)."""

    prior: Literal["flat", "start"] = "flat"

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        start_from(job)
        trained = train(job, loss=prior_loss(job, self.prior), method=self if self.prior == "start" else None)
        posterior = point(job)
        return posterior, FitReport(
            "map", posterior.family, len(job.train), trained.steps, trained.seconds, trained.final_loss,
            held_out_nll(posterior, job),
        )  # fmt: skip


def point(job: Job) -> DiagonalGaussian:
    """All weight on what the adapter holds now."""
    origin = Origin(base_fingerprint(job.model), data_size=len(job.train))
    mean = adapter_tensors(job.model, job.adapter)
    return DiagonalGaussian(peft_config_dict(job.model, job.adapter), mean, {}, origin)
