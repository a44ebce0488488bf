"""Fit a last layer on features that stay as they are: a closed-form start, then Adam on the ELBO.

    ELBO / N = mean_n E_q log p(y_n | offset_n + w . phi_n) - KL(q || p) / N

    head, fitted = fit_head(task, Data(phi, offset, target), HeadSettings())

Start. Regression: the conjugate posterior, noise and prior variance by iterating their closed-form optima; with a full
or diagonal covariance this is the optimum and no step is taken. Otherwise Laplace's approximation at f = offset:
S_c = (sum_n h_nc phi phi^T + I / s^2)^-1, which the first steps correct for being in the wrong place.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from .classification import Normals
from .covariance import DENSE_UP_TO, Covariance, Diagonal, LowRank, check_structure, from_precision
from .gaussian import Head
from .regression import best_noise, ridge
from .tasks import Task

ROUNDS = 200
"""Of closed-form updates of a regression's noise and prior, at most."""


@dataclass(frozen=True)
class Data:
    """phi [N, F]; offset [N, C]: what is added to w . phi; target [N] or [N, C]; guess [N, C]: outputs that the mean
    should start near, None for 0."""

    phi: Tensor
    offset: Tensor
    target: Tensor
    guess: Tensor | None = None

    def __len__(self) -> int:
        return len(self.phi)

    def double(self) -> Data:
        guess = None if self.guess is None else self.guess.double()
        target = self.target.double() if self.target.is_floating_point() else self.target
        return Data(self.phi.double(), self.offset.double(), target, guess)

    def rows(self, index: Tensor) -> Data:
        return Data(self.phi[index], self.offset[index], self.target[index])


@dataclass(frozen=True)
class HeadSettings:
    """covariance, rank, shared: structure of S.
    prior_scale: s; learn_prior: whether it moves to its best with the fit; None: of a regression alone, where the bound
    can be tight. Of classes it tends to shrink s until nothing is learnt, the more so the looser the bound.
    noise_variance: of a regression; None is learnt.
    steps: of Adam, on batch_size rows or all there are, its rate falling to 0 along a half cosine."""

    covariance: str = "full"
    rank: int = 8
    shared: bool = False
    prior_scale: float = 3.0
    learn_prior: bool | None = None
    noise_variance: float | None = None
    steps: int = 300
    batch_size: int = 256
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        check_structure(self.covariance, self.rank)
        if not 0 < self.prior_scale < math.inf:
            raise UserError(f"prior_scale must be > 0, got {self.prior_scale}")
        if self.noise_variance is not None and not 0 < self.noise_variance < math.inf:
            raise UserError(f"the noise variance must be > 0, got {self.noise_variance}")
        if self.steps < 0 or self.batch_size < 1 or not self.learning_rate > 0:
            raise UserError(
                "steps must be >= 0, batch_size >= 1, learning_rate > 0; got "
                f"{self.steps}, {self.batch_size}, {self.learning_rate}"
            )

    def learns_prior(self, task: Task) -> bool:
        return task.kind == "regression" if self.learn_prior is None else self.learn_prior


@dataclass(frozen=True)
class Fitted:
    """elbo_start, elbo: nats an example over all the data; steps; seconds."""

    elbo_start: float
    elbo: float
    steps: int
    seconds: float


def fit_head(task: Task, data: Data, settings: HeadSettings, seed: int = 0) -> tuple[Head, Fitted]:
    """The head in data.phi's dtype (closed forms are in fp64), on its device.

    UserError for no data, NaN in it, or shapes that do not agree.
    """
    check_data(task, data)
    began = time.perf_counter()
    head = start(task, data.double(), settings).to(data.phi.dtype)
    before = elbo_of(task, head, data, settings.learns_prior(task), seed)
    exact = task.kind == "regression" and settings.covariance != "low_rank" and not settings.shared
    steps = 0 if exact else settings.steps
    if steps:
        adam(task, head, data, settings, seed)
    if settings.learns_prior(task):
        head.prior_variance.fill_(head.closest_prior())
    after = elbo_of(task, head, data, False, seed)
    return head, Fitted(before, after, steps, time.perf_counter() - began)


def elbo(
    task: Task,
    head: Head,
    data: Data,
    count: int,
    learn_prior: bool = False,
    normals: Normals = torch.randn,
) -> Tensor:
    """Per example, of the rows in `data` out of `count`: mean E log p - KL / count."""
    mean, variance = head.moments(data.phi)
    fits = task.expected_log_prob(head, data.offset + mean, variance, data.target, normals)
    return fits.mean() - head.kl(learn_prior) / count


@torch.no_grad()
def elbo_of(task: Task, head: Head, data: Data, learn_prior: bool, seed: int) -> float:
    """Over all the data, with fixed noise."""
    normals = _normals(torch.Generator().manual_seed(seed))
    return float(elbo(task, head, data, len(data), learn_prior, normals))


def _normals(generator: torch.Generator) -> Normals:
    return lambda shape: torch.randn(shape, generator=generator)


def adam(task: Task, head: Head, data: Data, settings: HeadSettings, seed: int) -> None:
    """settings.steps steps on the ELBO, in place; batches are cut from one permutation after another."""
    learnt = [
        p for name, p in head.named_parameters() if name != "log_noise" or settings.noise_variance is None
    ]
    optimizer = torch.optim.Adam(learnt, lr=settings.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(seed)
    normals = _normals(generator)
    size = min(settings.batch_size, len(data))
    order = torch.empty(0, dtype=torch.long)
    with torch.enable_grad():
        for _ in range(settings.steps):
            if size < len(data):
                if len(order) < size:
                    order = torch.randperm(len(data), generator=generator)
                index, order = order[:size].to(data.phi.device), order[size:]
                part = data.rows(index)
            else:
                part = data
            optimizer.zero_grad(set_to_none=True)
            loss = -elbo(task, head, part, len(data), settings.learns_prior(task), normals)
            loss.backward()
            optimizer.step()
            schedule.step()
    for p in head.parameters():
        p.grad = None


@torch.no_grad()
def start(task: Task, data: Data, settings: HeadSettings) -> Head:
    """The closed-form start of the module's docstring."""
    if task.kind == "regression":
        return _conjugate(task, data, settings)
    prior = settings.prior_scale**2
    weights = task.curvature(data.offset if data.guess is None else data.guess)
    covariance = _laplace(data.phi, weights, prior, settings)
    mean = data.phi.new_zeros(task.outputs, data.phi.shape[1])
    if data.guess is not None:
        aim = data.guess - data.offset
        if task.kind == "classification":  # a softmax has a constant to spare
            aim = aim - aim.mean(-1, keepdim=True)
        mean = ridge(data.phi, aim, aim.new_ones(task.outputs), prior)
    return Head(mean, covariance, prior)


def _conjugate(task: Task, data: Data, settings: HeadSettings) -> Head:
    """The posterior; noise and prior at their best for it (to 1e-6 in relative terms) where they are learnt."""
    aim = data.target - data.offset
    prior = settings.prior_scale**2
    given = settings.noise_variance
    spread = aim.var(0, correction=0).clamp_min(1e-6) / 2
    noise = spread if given is None else torch.full_like(spread, given)
    for _ in range(ROUNDS):
        mean = ridge(data.phi, aim, noise, prior)
        covariance = _laplace(data.phi, (1 / noise).expand(len(data), -1), prior, settings)
        head = Head(mean, covariance, prior, noise)
        before = noise, prior
        if given is None:
            noise = best_noise(*head.moments(data.phi), aim)
        if settings.learns_prior(task):
            prior = head.closest_prior()
        moved = float((noise / before[0]).log().abs().max()) + abs(math.log(prior / before[1]))
        if moved < 1e-6:
            break
    return head


def _laplace(phi: Tensor, weights: Tensor, prior: float, settings: HeadSettings) -> Covariance:
    """(sum_n weights_nc phi phi^T + I / prior)^-1 in the structure wanted; weights [N, C]."""
    if settings.shared:
        weights = weights.mean(-1, keepdim=True)
    size = phi.shape[1]
    diagonal = weights.mT @ phi.square() + 1 / prior
    if settings.covariance == "diagonal":
        return Diagonal(1 / diagonal)
    if size <= DENSE_UP_TO:
        eye = torch.eye(size, dtype=phi.dtype, device=phi.device) / prior
        precision = torch.stack([(phi * w[:, None]).mT @ phi + eye for w in weights.mT])
        return from_precision(settings.covariance, precision, settings.rank)
    if settings.covariance == "full":
        raise UserError(f"a full covariance of {size} features has {size}^2 numbers a row: project to fewer than "
                        f"{DENSE_UP_TO} features, or take low_rank or diagonal")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(*diagonal.shape, settings.rank, generator=generator).to(phi) * 1e-2
    return LowRank(1 / diagonal, factor * prior**0.5)


def check_data(task: Task, data: Data) -> None:
    if len(data) == 0:
        raise UserError("no examples to fit a last layer on")
    if data.offset.shape != (len(data), task.outputs):
        raise UserError(
            f"a {task.kind} head of {task.outputs} outputs on {len(data)} examples has an offset of shape "
            f"{(len(data), task.outputs)}, got {tuple(data.offset.shape)}"
        )
    for name in ("phi", "offset", "target"):
        if not bool(torch.isfinite(getattr(data, name)).all()):
            raise UserError(
                f"the {'features' if name == 'phi' else name} of a last layer hold NaN or infinity"
            )
    if task.kind == "classification" and not bool(((data.target >= 0) & (data.target < task.outputs)).all()):
        raise UserError(f"a target is none of the {task.outputs} classes: {float(data.target.max())}")
