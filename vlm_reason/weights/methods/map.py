"""Maximum a posteriori: one adapter, no uncertainty in the weights. The baseline."""

from __future__ import annotations

from dataclasses import dataclass

from ..families.diagonal import DiagonalGaussian
from ..held_out import held_out_nll
from ..job import FitReport, Job
from ..posterior import Origin, Posterior, adapter_tensors, base_fingerprint, peft_config_dict
from ..training import train


@dataclass(frozen=True)
class MAP:
    """Plain training with `training.weight_decay`; the posterior is a point mass."""

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        if job.start is not None:
            job.start.write(job.model, job.start.mean(), job.adapter)
        trained = train(job)
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
