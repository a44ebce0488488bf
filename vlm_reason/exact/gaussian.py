"""The linear-Gaussian world: a continuous latent z whose evidence, posterior and gaps are closed forms.

    z ~ N(0, I_d),    x | z ~ N(W z + b, s^2 I_D)
    log p(x) = log N(x; b, W W' + s^2 I),    p(z|x) = N(m, S),  S = (I + W'W / s^2)^-1,  m = S W'(x - b) / s^2

The check for estimators over real vectors, where nothing can be enumerated. Tipping & Bishop 1999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance): mean [.., d], covariance [d, d]."""

    mean: Tensor
    covariance: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z), [..], for z [.., d]."""
        return self._law().log_prob(z)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` draws, [count, .., d]."""
        noise = torch.randn(count, *self.mean.shape, dtype=self.mean.dtype, generator=generator)
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).mT

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) in nats, [..]."""
        return torch.distributions.kl_divergence(self._law(), other._law())

    def _law(self) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance)


@dataclass(frozen=True)
class LinearGaussian:
    """weight W [D, d], bias b [D], noise s > 0 (a standard deviation). Autograd reaches all three."""

    weight: Tensor
    bias: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1] or self.noise.ndim != 0:
            raise UserError(
                "need weight [D, d], bias [D] and a scalar noise, got "
                f"{list(self.weight.shape)}, {list(self.bias.shape)} and {list(self.noise.shape)}"
            )
        noise = self.noise.item()
        if not noise > 0:
            raise UserError(f"noise is a standard deviation and must be > 0, got {noise}")

    @classmethod
    def random(cls, observed: int = 3, latent: int = 2, noise: float = 0.5, seed: int = 0) -> LinearGaussian:
        """Standard normal W and b in fp64, requiring gradients."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(observed, latent, dtype=torch.float64, generator=generator).requires_grad_()
        bias = torch.randn(observed, dtype=torch.float64, generator=generator).requires_grad_()
        return cls(weight, bias, torch.tensor(noise, dtype=torch.float64, requires_grad=True))

    def prior(self) -> Gaussian:
        d = self.weight.shape[1]
        return Gaussian(self.weight.new_zeros(d), torch.eye(d, dtype=self.weight.dtype))

    def marginal(self) -> Gaussian:
        """p(x) = N(b, W W' + s^2 I)."""
        identity = torch.eye(len(self.bias), dtype=self.weight.dtype)
        return Gaussian(self.bias, self.weight @ self.weight.mT + self.noise**2 * identity)

    def log_marginal(self, x: Tensor) -> Tensor:
        """log p(x), [..], for x [.., D]."""
        return self.marginal().log_prob(x)

    def posterior(self, x: Tensor) -> Gaussian:
        """p(z|x) = N(m, S)."""
        identity = torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
        covariance = torch.linalg.inv(identity + self.weight.mT @ self.weight / self.noise**2)
        # inv leaves rounding-size asymmetry, which the Gaussian's constructor refuses.
        covariance = (covariance + covariance.mT) / 2
        return Gaussian((x - self.bias) @ self.weight @ covariance / self.noise**2, covariance)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), [..]."""
        residual = x - self.bias - z @ self.weight.mT
        size = x.shape[-1]
        return -0.5 * (residual / self.noise).square().sum(-1) - size * (
            self.noise.log() + 0.5 * math.log(2 * math.pi)
        )

    def log_weights(self, x: Tensor, z: Tensor, q: Gaussian) -> Tensor:
        """log w = log p(z) + log p(x|z) - log q(z), [..]."""
        return self.prior().log_prob(z) + self.log_likelihood(x, z) - q.log_prob(z)

    def elbo(self, x: Tensor, q: Gaussian) -> Tensor:
        """E_q log p(x|z) - KL(q || prior), in closed form."""
        spread = (self.weight @ q.covariance * self.weight).sum() / self.noise**2
        return self.log_likelihood(x, q.mean) - 0.5 * spread - q.kl(self.prior())

    def eubo(self, x: Tensor, q: Gaussian) -> Tensor:
        """log p(x) + KL(posterior || q)."""
        return self.log_marginal(x) + self.posterior(x).kl(q)

    def cubo(self, x: Tensor, q: Gaussian) -> Tensor:
        """(1/2) log E_q[w^2] for one x [D], by a Gaussian integral; +inf where it diverges (q too narrow).

        With precisions L of the posterior and P of q: finite iff A = 2 L - P is positive definite.
        """
        post = self.posterior(x)
        precision, q_precision = torch.linalg.inv(post.covariance), torch.linalg.inv(q.covariance)
        tilted = 2 * precision - q_precision
        if bool((torch.linalg.eigvalsh(tilted) <= 0).any()):
            return torch.tensor(math.inf, dtype=x.dtype)
        shift = 2 * precision @ post.mean - q_precision @ q.mean
        quadratic = (
            shift @ torch.linalg.solve(tilted, shift)
            - 2 * post.mean @ precision @ post.mean
            + q.mean @ q_precision @ q.mean
        )
        log_det = 2 * torch.logdet(precision) - torch.logdet(q_precision) - torch.logdet(tilted)
        return self.log_marginal(x) + 0.25 * (log_det + quadratic)
