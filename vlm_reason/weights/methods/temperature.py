"""Temperature scaling: one scalar that all logits are divided by, fitted on held-out data.

    T* = argmin_T  -sum_i log mean_s softmax(f_s(x_i) / T)[y_i]

By Newton's method on log T, with bisection where a step would leave the bracket (Guo et al. 2017, "On calibration of
modern neural networks", arXiv 1706.04599, for one draw; here for the mixture of any number of them).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...config import from_dict
from ...errors import UserError, nearest
from ..continual import start_from
from ..examples import Example, make_batch
from ..held_out import nll_of_outputs, outputs_of_draws
from ..job import FitReport, Job
from ..likelihoods import Likelihood
from ..posterior import Posterior

LOWEST, HIGHEST = 1 / 32, 32.0
"""T is looked for between these: held-out data that are all right have no optimum above 0."""


@dataclass(frozen=True)
class Temperature:
    """Fit `method` (with its `options`), then T on job.held_out; without held-out examples, on a share `split` of the
    training examples, chosen by job.seed, which the method then does not see. job.start given and method null: T of
    that posterior, nothing is trained. T is in Origin.output_temperature, and every prediction divides by it.

    method   name of the method that fits the posterior; null takes job.start
    options  its settings
    split    share of the training examples, 0 for none; only without held-out examples
    draws    of the posterior, for its predictive

    It changes no answer of a single set of weights, only how sure it is: accuracy and AUROC stay. UserError without
    held-out examples and split, and for likelihoods whose outputs are no logits of classes.
    """

    method: str | None = "map"
    options: Mapping[str, Any] = field(default_factory=dict)
    split: float = 0.0
    draws: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.split < 1:
            raise UserError(f"temperature: split must be in [0, 1), got {self.split}")
        if self.draws < 1:
            raise UserError(f"temperature: draws must be >= 1, got {self.draws}")
        if self.method == "temperature":
            raise UserError("temperature: method is what fits the posterior, it cannot be temperature itself")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        inner = self._with_held_out(job)
        posterior, report = self._fitted(inner)
        scaled, details = scale(posterior, inner, self.draws)
        return scaled, replace(
            report,
            method="temperature",
            held_out_nll=details["held_out_nll"],
            details={**report.details, "of": report.method, **details},
        )

    def _with_held_out(self, job: Job) -> Job:
        if job.held_out:
            return job
        train, held_out = split_off(job.train, self.split, job.seed)
        return replace(job, train=train, held_out=held_out)

    def _fitted(self, job: Job) -> tuple[Posterior, FitReport]:
        from . import METHODS

        if self.method is None:
            if job.start is None:
                raise UserError("temperature: method is null and there is no posterior to start from")
            start_from(job)
            return job.start, FitReport("given", job.start.family, len(job.train), 0, 0.0)
        if self.method not in METHODS:
            raise UserError(f"temperature: unknown method {self.method!r}{nearest(self.method, METHODS)}")
        return from_dict(METHODS[self.method], self.options, "options.options").fit(job)


def scale(posterior: Posterior, job: Job, draws: int = 10) -> tuple[Posterior, dict[str, Any]]:
    """`posterior`, of any family, with the T that is best on job.held_out (times the one it has already), and what
    there is to say of it: temperature, held-out NLL before and after, whether T is at an end of its range."""
    if not job.held_out:
        raise UserError(
            "temperature scaling needs held-out examples: give held_out, or a split of the training data"
        )
    f = outputs_of_draws(posterior, job, job.held_out, draws)
    best = best_temperature(f, job.held_out, job.likelihood)
    scaled = copy.copy(posterior)
    total = posterior.origin.output_temperature * best
    scaled.origin = replace(posterior.origin, output_temperature=total)
    return scaled, {
        "temperature": total,
        "held_out": len(job.held_out),
        "nll_before": nll_of_outputs(f, job.held_out, job.likelihood),
        "held_out_nll": nll_of_outputs(f / best, job.held_out, job.likelihood),
        "at_bound": not LOWEST * 1.001 < best < HIGHEST / 1.001,
    }


def best_temperature(f: Tensor, examples: Sequence[Example], likelihood: Likelihood) -> float:
    """T of f [S, B, C], logits of C >= 2 classes, for the targets of `examples`."""
    if f.shape[-1] < 2:
        raise UserError(
            f"temperature scaling is for logits of classes; {type(likelihood).__name__} gives one number an example"
        )
    f = f.double()
    target = make_batch(examples).target.long()
    low, high = math.log(LOWEST), math.log(HIGHEST)
    x = 0.0
    for _ in range(200):
        slope, curvature = _derivatives(f, target, x)
        low, high = (x, high) if slope < 0 else (low, x)
        newton = x - slope / curvature if curvature > 0 else math.inf
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - x) < 1e-12:
            break
        x = following
    return math.exp(x)


def _derivatives(f: Tensor, target: Tensor, x: float) -> tuple[float, float]:
    """First and second derivative of the NLL in x = log T. With u = 1 / T and l_s = log softmax(u f_s)[y]:

    l_s' = f_sy - E[f_s],  l_s'' = -Var[f_s],  of log mean_s exp l_s:  E_w[l'],  E_w[l'' + l'^2] - E_w[l']^2
    """
    u = math.exp(-x)
    p = (u * f).softmax(-1)
    mean = (p * f).sum(-1)
    chosen = f.gather(-1, target.expand(f.shape[:-1])[..., None]).squeeze(-1)
    first = chosen - mean
    second = -(p * (f - mean[..., None]).square()).sum(-1)
    weight = (u * chosen - torch.logsumexp(u * f, -1)).softmax(0)
    slope = (weight * first).sum(0)
    curvature = (weight * (second + first.square())).sum(0) - slope.square()
    total, bend = float(slope.sum()), float(curvature.sum())
    return u * total, -(u * u * bend + u * total)


def split_off(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out): a share of the examples by `seed`, both in their order. UserError where either is empty."""
    count = round(share * len(examples))
    if not 0 < count < len(examples):
        raise UserError(
            f"temperature scaling needs held-out examples: give held_out, or options.split (now {share:g} of "
            f"{len(examples)} training examples)"
        )
    generator = torch.Generator().manual_seed(seed)
    out = set(torch.randperm(len(examples), generator=generator)[:count].tolist())
    return [e for n, e in enumerate(examples) if n not in out], [
        e for n, e in enumerate(examples) if n in out
    ]
