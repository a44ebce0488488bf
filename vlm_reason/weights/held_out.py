"""What a posterior's predictive scores on examples: one number, for reports and for choosing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .examples import Example, make_batch
from .job import Job
from .likelihoods import Likelihood
from .posterior import Posterior


def held_out_nll(posterior: Posterior, job: Job, draws: int = 10) -> float | None:
    """-mean_i log mean_s p(y_i | f_s(x_i)) over job.held_out, nats an example; None without held-out examples."""
    if not job.held_out:
        return None
    result = posterior.predictive(
        job.model, job.held_out, job.likelihood, draws, seed=job.seed, adapter=job.adapter
    )
    assert result.log_prob is not None
    return -float(result.log_prob.double().mean())


def outputs_of_draws(posterior: Posterior, job: Job, examples: Sequence[Example], draws: int) -> Tensor:
    """f [S, B, C], fp64, of `draws` draws seeded by job.seed (one pass where nothing is uncertain), mode `auto`."""
    result = posterior.predictive(
        job.model, examples, job.likelihood, draws, keep_logits=True, seed=job.seed, adapter=job.adapter
    )
    assert result.logits is not None
    return result.logits.double().cpu()


def nll_of_outputs(f: Tensor, examples: Sequence[Example], likelihood: Likelihood) -> float:
    """f [S, B, C]"""
    logp = likelihood.log_prob(f, make_batch(examples))
    return float(-(torch.logsumexp(logp, 0) - math.log(len(f))).mean())
