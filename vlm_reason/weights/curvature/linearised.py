"""How well the linearised model predicts held-out targets: what a prior precision can be chosen by.

    f ~ N(f*, J Sigma J^T),    -mean_n log E_f p(y_n | f)

The expectation is over 512 fixed draws of f (in outputs, not in weights: no forward passes), for any likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..examples import in_batches
from ..jacobians import jacobians
from ..job import Job
from ..posterior import Posterior

DRAWS = 512
_MOST = 2 << 23  # weights times examples of a batch


def linearised_nll(posteriors: Sequence[Posterior], job: Job) -> list[float]:
    """Of each posterior, nats an example of job.held_out. All have their mean in the model's adapter now."""
    keys = sorted({key for p in posteriors for key in p.uncertain()})
    mean = posteriors[0].mean()
    rows = max(1, _MOST // max(1, sum(mean[k].numel() for k in keys)))
    totals = [0.0] * len(posteriors)
    half: torch.Tensor | None = None
    was_training = [m for m in job.model.modules() if m.training]
    job.model.eval()
    device = next(job.model.parameters()).device
    for batch in in_batches(job.held_out, 4096, rows):
        f, j = jacobians(job.model, batch.to(device), job.likelihood, keys, job.adapter)
        f, j = f.double().cpu(), {k: v.cpu() for k, v in j.items()}
        if half is None:
            generator = torch.Generator().manual_seed(0)
            half = torch.randn(DRAWS // 2, 1, f.shape[1], generator=generator, dtype=torch.float64)
        white = torch.cat([half, -half])
        for n, posterior in enumerate(posteriors):
            values, vectors = torch.linalg.eigh(posterior.output_covariance(j))
            root = vectors * values.clamp_min(0).sqrt()[:, None, :]
            draws = f + (white[:, :, None, :] * root).sum(-1)
            logp = job.likelihood.log_prob(draws, batch)
            totals[n] -= float((logp.logsumexp(0) - math.log(DRAWS)).sum())
    for module in was_training:
        module.training = True
    return [t / len(job.held_out) for t in totals]
