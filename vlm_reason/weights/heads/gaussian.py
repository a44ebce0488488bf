"""A Gaussian last layer: C rows w_c ~ N(mu_c, S_c) on features phi, with the prior w_c ~ N(0, s^2 I).

    f_c = offset_c + w_c . phi          f_c | phi ~ N(offset_c + mu_c . phi, phi^T S_c phi)
    KL(q || p) = 1/2 sum_c [ (tr S_c + |mu_c|^2) / s^2 - F + F log s^2 - log |S_c| ]

The s^2 that minimises the KL is sum_c (tr S_c + |mu_c|^2) / (C F): type-II maximum likelihood of the prior.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .covariance import Covariance


class Head(nn.Module):
    """mean [C, F]; covariance of C rows or of one that all share; prior_variance s^2; noise_variance [C] of a
    regression, else None."""

    prior_variance: Tensor

    def __init__(
        self,
        mean: Tensor,
        covariance: Covariance,
        prior_variance: float,
        noise_variance: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert covariance.rows in (1, len(mean)), "one covariance a row, or one for all"
        self.mean = nn.Parameter(mean.detach().clone())
        self.covariance = covariance
        self.register_buffer("prior_variance", torch.tensor(float(prior_variance), dtype=mean.dtype))
        self.log_noise = None if noise_variance is None else nn.Parameter(noise_variance.detach().log())

    @property
    def outputs(self) -> int:
        return len(self.mean)

    @property
    def features(self) -> int:
        return self.mean.shape[1]

    def moments(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of w . phi, [B, C] each, of phi [B, F]."""
        mean = phi @ self.mean.mT
        return mean, self.covariance.variance(phi).expand_as(mean)

    def kl(self, learn_prior: bool = False) -> Tensor:
        """To the prior, nats. learn_prior: to the closest prior of its kind."""
        count = self.mean.numel()
        repeated = self.outputs / self.covariance.rows
        spread = repeated * self.covariance.diagonal().sum() + self.mean.square().sum()
        log_det = repeated * self.covariance.log_det().sum()
        if learn_prior:
            return (count * (spread / count).log() - log_det) / 2
        s2 = self.prior_variance
        return (spread / s2 - count + count * s2.log() - log_det) / 2

    @torch.no_grad()
    def closest_prior(self) -> float:
        """The variance s^2 with the smallest KL."""
        repeated = self.outputs / self.covariance.rows
        spread = repeated * self.covariance.diagonal().sum() + self.mean.square().sum()
        return float(spread / self.mean.numel())

    @torch.no_grad()
    def draw(self, noise: Tensor) -> Tensor:
        """w [C, F] of standard normals [C, covariance.noise_size]."""
        return self.mean + self.covariance.deviation(noise)

    @torch.no_grad()
    def log_prob(self, w: Tensor) -> Tensor:
        """log q(w) of w [C, F], nats; dense F x F matrices in fp64 unless the covariance is diagonal."""
        apart = (w - self.mean).double()
        constant = w.numel() * math.log(2 * math.pi) + self.outputs / self.covariance.rows * float(
            self.covariance.log_det().sum()
        )
        if self.covariance.structure == "diagonal":
            return -((apart.square() / self.covariance.diagonal()).sum() + constant) / 2
        root = torch.linalg.cholesky(self.covariance.dense().double())
        solved = torch.linalg.solve_triangular(root, apart[..., None], upper=False)
        return -(solved.square().sum() + constant) / 2

    @torch.no_grad()
    def kl_to(self, other: Head) -> Tensor:
        """KL(self || other), nats, of heads of one shape; dense matrices in fp64."""
        p, q = self.covariance.dense().double(), other.covariance.dense().double()
        root = torch.linalg.cholesky(q)
        apart = (self.mean - other.mean).double()[..., None]
        trace = torch.cholesky_solve(p, root).diagonal(dim1=-2, dim2=-1).sum(-1)
        distance = torch.linalg.solve_triangular(root, apart, upper=False).square().sum((-2, -1))
        log_ratio = torch.linalg.slogdet(q)[1] - torch.linalg.slogdet(p)[1]
        return (trace + distance - self.features + log_ratio).sum() / 2
