"""Yesterday's posterior is today's prior.

    log p(theta | old and new data) = log p(new data | theta) + log p(theta | old data) + constant,
    log p(theta | old data)         ~ -1/2 sum_i P_i (theta_i - m_i)^2

P and m are the diagonal precision and the mean of a posterior fitted before. In the mean loss over the N new examples
that is a quadratic penalty over N: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), with the
posterior that came out of the fit in place of an estimated Fisher matrix. With a variational optimiser (weight_decay 0,
lambda = N) the same penalty gives variational continual learning (Nguyen et al. 2018, arXiv 1710.10628).

    start_from(job)                                     # the adapter at the mean of job.start
    train(job, loss=prior_loss(job))                    # nll + penalty; `map` and `ivon` do with prior "start"
    posterior = with_prior_precision(posterior, job.start)    # for a fit that saw the new data's curvature alone
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from ..errors import UserError
from .adapter import adapter_tensors, same_keys
from .artefact import Tree
from .examples import Batch
from .families.diagonal import DiagonalGaussian
from .job import Job
from .likelihoods import Likelihood
from .posterior import Posterior
from .training import Loss, negative_log_likelihood


def start_from(job: Job) -> None:
    """The adapter at the mean of job.start; nothing without one. UserError for a start on another base model or of
    other shapes."""
    if job.start is not None:
        job.start.check_base(job.model)
        job.start.write(job.model, job.start.mean(), job.adapter)


def check_not_scaled(job: Job, name: str) -> None:
    """UserError for a start whose outputs are divided by a temperature: method `name` approximates the posterior of
    the outputs as they are, and what it finds needs a temperature of its own."""
    scaled = 1.0 if job.start is None else job.start.origin.output_temperature
    if scaled != 1.0:
        raise UserError(
            f"{name}: the start divides its outputs by {scaled:g}, which would be lost: start from the posterior as it "
            "was before, and scale afterwards, with method temperature"
        )


def prior_loss(job: Job, prior: str = "start", loss: Loss = negative_log_likelihood) -> Loss:
    """`loss` under a method's setting `prior`: "start" is with job.start as the prior, anything else `loss` itself.

    UserError for "start" without a start, or with one that is certain of all weights: it is a place to begin at, and
    says nothing about how far to go."""
    if prior != "start":
        return loss
    if job.start is None or not job.start.uncertain():
        what = "there is none" if job.start is None else "it is certain of all weights"
        raise UserError(f'prior "start" makes a posterior the job starts from the prior, and {what}')
    return prior_penalty(job.start, len(job.train), loss, job.adapter)


def prior_penalty(
    start: Posterior, size: int, loss: Loss = negative_log_likelihood, adapter: str = "default"
) -> Loss:
    """loss + 1 / (2 size) sum_i P_i (theta_i - m_i)^2, size = N, the number of new examples.

    Over all weights that `start` is uncertain of. A tensor it is certain of has no penalty: train it only if what is
    there is no more than a beginning (B of `blob`). A cold posterior (lambda > N, temper > 1) is a strong prior:
    `start.temper` changes that. Training with weight_decay on top counts a zero-mean prior twice.

    UserError for a family without a diagonal precision, for a tensor of which some weights are certain and others not
    (a pruned posterior), and for size < 1.
    """
    if size < 1:
        raise UserError(f"the number of new examples must be at least 1, got {size}")
    mean, precision = start.mean(), start.precision_diag()
    chosen = [key for key in start.uncertain() if not bool(precision[key].isinf().all())]
    for key in chosen:
        if bool(precision[key].isinf().any()):
            raise UserError(
                f"{int(precision[key].isinf().sum())} weights of {key!r} are certain in the prior (pruned?): a penalty "
                "cannot hold them; start from the posterior before it was pruned"
            )
    on: dict[torch.device, tuple[Tree, Tree]] = {}

    def with_penalty(model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
        tensors = adapter_tensors(model, adapter)
        device = tensors[chosen[0]].device if chosen else torch.device("cpu")
        if device not in on:
            on[device] = tuple({k: t[k].to(device) for k in chosen} for t in (mean, precision))  # type: ignore[assignment]
        value = loss(model, batch, likelihood)
        at = {key: tensors[key] for key in chosen}
        return value + quadratic(at, *on[device]) / size

    return with_penalty


def quadratic(values: Tree, mean: Tree, precision: Tree) -> Tensor:
    """1/2 sum_i P_i (theta_i - m_i)^2, nats: -log N(theta; m, 1 / P) without its constant."""
    parts = [
        (precision[key] * (value.float() - mean[key]).square()).sum() / 2 for key, value in values.items()
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def with_prior_precision(posterior: DiagonalGaussian, start: Posterior | None) -> DiagonalGaussian:
    """`posterior`, whose precision has the new data's curvature and its own zero-mean prior alone, with start's
    precision in place of that prior; unchanged without a start or with one that is certain of all weights.

        1 / sigma^2 = H_new + P_start

    UserError where the two are not over the same adapter."""
    if start is None or not start.uncertain():
        return posterior
    old, own = start.precision_diag(), posterior.precision_diag()
    same_keys(old, own, "the posterior and its prior are not over the same adapter")
    sigma = {}
    made = posterior.origin
    for key in posterior.uncertain():
        prior = made.temper * made.prior.get(key, 0.0)  # tempering divides the prior's variance too
        curvature = (own[key].double() - prior).clamp_min(0)
        was = old[key].double()
        known = torch.where(was.isinf(), own[key].double(), curvature + was)
        sigma[key] = known.rsqrt().float()
    origin = replace(made, prior={})
    return DiagonalGaussian(posterior.adapter_config, posterior.mean(), sigma, origin)
