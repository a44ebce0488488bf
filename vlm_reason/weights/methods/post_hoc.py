"""What Laplace approximations of every shape share: the adapter they are put on, the prior, the report.

train if need be -> curvature of all examples -> prior precision -> posterior
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from ...errors import UserError
from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict
from ..continual import check_not_scaled
from ..curvature import Accumulator, collect
from ..curvature.evidence import groups
from ..curvature.linearised import linearised_nll
from ..curvature.shapes import Centre, Shape
from ..examples import Batch
from ..families.diagonal import DiagonalGaussian
from ..job import FitReport, Job
from ..likelihoods import Likelihood, Tokens
from ..posterior import Origin, Posterior
from ..training import negative_log_likelihood, train

Prior = Literal["evidence", "held_out", "fixed", "start"]
Groups = Literal["global", "kind", "tensor"]
GRID = tuple(10.0 ** (e / 2) for e in range(-8, 9))
Held = TypeVar("Held", bound=Accumulator)


@dataclass(frozen=True)
class Settings:
    """What `Laplace` and `Core` both have; see there."""

    prior: Prior
    prior_precision: float
    groups: Groups
    grid: Sequence[float]
    temperature: float
    samples: int
    train: bool | None
    tokens: int

    def __post_init__(self) -> None:
        for name, allowed in (
            ("prior", ("evidence", "held_out", "fixed", "start")),
            ("groups", ("global", "kind", "tensor")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("prior_precision", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be > 0, got {getattr(self, name)}")
        if not self.grid or not all(0 < d < float("inf") for d in self.grid):
            raise UserError(f"grid must hold prior precisions > 0, got {list(self.grid)}")
        if self.tokens < 1:
            raise UserError(f"tokens must be >= 1, got {self.tokens}")
        if self.samples < 0:
            raise UserError(f"samples must be >= 0, got {self.samples}")


def fit_post_hoc(
    job: Job, method: str, settings: Settings, curvature: Held, shaped: Callable[[Held, Centre, float], Shape]
) -> tuple[Posterior, FitReport]:
    """The whole of a method, given an empty accumulator and the shape its sums are read as."""
    check_not_scaled(job, method)
    started = time.perf_counter()
    prior = _prior_posterior(job, settings)
    steps = _trained(job, settings, prior)
    before = time.perf_counter()
    log_likelihood = collect(
        job.model,
        job.train,
        job.likelihood,
        curvature,
        job.adapter,
        settings.samples,
        job.seed,
        settings.tokens,
    )
    seconds = time.perf_counter() - before
    tensors = {k: v.detach().cpu() for k, v in adapter_tensors(job.model, job.adapter).items()}
    shape = shaped(curvature, Centre(peft_config_dict(job.model, job.adapter), tensors), settings.temperature)
    size = len(job.train)
    origin = Origin(base_fingerprint(job.model), size / settings.temperature, size)
    details: dict[str, Any] = {"curvature_seconds": round(seconds, 3), "curvature_numbers": curvature.numel()}
    if prior is not None:
        posterior, share = shape.on_prior(prior, origin)
    else:
        deltas = _deltas(job, settings, shape, origin, details)
        posterior, share = shape.posterior(deltas, _with_prior(origin, deltas)), shape.evidence(deltas)
        group_of = groups(shape.keys, settings.groups)
        details["prior_precision"] = {group_of[k]: d for k, d in deltas.items()}
    details["log_evidence"] = log_likelihood / settings.temperature + share
    nll = None
    if job.held_out and not isinstance(job.likelihood, Tokens):
        nll = linearised_nll([posterior], job)[0]
    return posterior, FitReport(
        method,
        posterior.family,
        size,
        steps,
        time.perf_counter() - started,
        -log_likelihood / size,
        nll,
        details,
    )


def _with_prior(origin: Origin, deltas: Mapping[str, float]) -> Origin:
    return Origin(origin.base, origin.ess, origin.data_size, prior=dict(deltas))


def _deltas(
    job: Job, settings: Settings, shape: Shape, origin: Origin, details: dict[str, Any]
) -> dict[str, float]:
    if settings.prior == "fixed":
        return dict.fromkeys(shape.keys, settings.prior_precision)
    if settings.prior == "evidence":
        return shape.best(groups(shape.keys, settings.groups))
    if not job.held_out:
        raise UserError("prior: held_out needs held-out examples, and there are none")
    if isinstance(job.likelihood, Tokens):
        raise UserError(
            "prior: held_out needs outputs that are linear in the weights; a token likelihood has none"
        )
    grid = list(settings.grid)
    scores = linearised_nll([shape.posterior(dict.fromkeys(shape.keys, d), origin) for d in grid], job)
    details["grid"] = [{"prior_precision": d, "nll": s} for d, s in zip(grid, scores, strict=True)]
    return dict.fromkeys(shape.keys, grid[min(range(len(grid)), key=lambda n: scores[n])])


def _prior_posterior(job: Job, settings: Settings) -> DiagonalGaussian | None:
    if settings.prior != "start":
        return None
    if job.start is None:
        raise UserError("prior: start needs a posterior to start from, and none is given")
    if not isinstance(job.start, DiagonalGaussian) or not job.start.uncertain():
        raise UserError(
            f"prior: start needs a diagonal Gaussian with uncertain weights, not family {job.start.family!r} with "
            f"{len(job.start.uncertain())} uncertain tensors"
        )
    return job.start


def _trained(job: Job, settings: Settings, prior: DiagonalGaussian | None) -> int:
    """Put the adapter where the posterior is to be; number of steps trained."""
    tensors = adapter_tensors(job.model, job.adapter)
    untrained = not any(bool(v.any()) for k, v in tensors.items() if ".lora_B" in k)
    wanted = (
        settings.train
        if settings.train is not None
        else untrained and (job.start is None or prior is not None)
    )
    if job.start is not None:
        job.start.check_base(job.model)
        if prior is None or wanted:
            job.start.write(job.model, job.start.mean(), job.adapter)
    if not wanted:
        return 0
    if prior is None:
        return train(job).steps
    loss = _penalised(job, prior, settings.temperature / len(job.train))
    return train(job, loss=loss, method=("prior start", settings.temperature)).steps


def _penalised(
    job: Job, prior: DiagonalGaussian, weight: float
) -> Callable[[PeftModel, Batch, Likelihood], Tensor]:
    """Mean negative log-likelihood + weight / 2 (theta - theta_0)^T P_0 (theta - theta_0)."""
    own = adapter_tensors(job.model, job.adapter)
    device = next(iter(own.values())).device
    centre = prior.mean()
    parts = [
        (own[k], centre[k].to(device), s.square().reciprocal().to(device)) for k, s in prior.sigma().items()
    ]

    def loss(model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
        distance = torch.stack([(p * (w - m).square()).sum() for w, m, p in parts]).sum()
        return negative_log_likelihood(model, batch, likelihood) + weight / 2 * distance

    return loss
