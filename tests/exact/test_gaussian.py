"""Closed forms of the linear-Gaussian world against quadrature, autograd and each other."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_reason.errors import UserError
from vlm_reason.exact import Gaussian, LinearGaussian
from vlm_reason.objectives import elbo, eubo, iwae

WORLD = LinearGaussian.random(observed=3, latent=2, seed=0)
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def wide(x: torch.Tensor = X) -> Gaussian:
    post = WORLD.posterior(x)
    return Gaussian(post.mean + 0.1, 1.4 * post.covariance)


def grid(per_axis: int = 400, reach: float = 7.0) -> tuple[torch.Tensor, float]:
    axis = torch.linspace(-reach, reach, per_axis, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), (2 * reach / (per_axis - 1)) ** 2


def test_log_marginal_and_bounds_by_quadrature() -> None:
    z, cell = grid()
    q = wide()
    joint = WORLD.prior().log_prob(z) + WORLD.log_likelihood(X, z)
    logq, logw = q.log_prob(z), WORLD.log_weights(X, z, q)
    assert torch.allclose(logw, joint - logq)
    assert WORLD.log_marginal(X).item() == pytest.approx(math.log(joint.exp().sum().item() * cell), abs=1e-9)
    assert WORLD.elbo(X, q).item() == pytest.approx((logq.exp() * logw).sum().item() * cell, abs=1e-9)
    second = (2 * joint - logq).exp().sum().item() * cell
    assert WORLD.cubo(X, q).item() == pytest.approx(0.5 * math.log(second), abs=1e-9)
    posterior = WORLD.posterior(X).log_prob(z)
    assert torch.allclose(posterior, joint - WORLD.log_marginal(X), atol=1e-10)
    assert WORLD.eubo(X, q).item() == pytest.approx((posterior.exp() * logw).sum().item() * cell, abs=1e-9)


def test_gaps_are_the_divergences() -> None:
    q, post, log_p = wide(), WORLD.posterior(X), WORLD.log_marginal(X)
    assert (log_p - WORLD.elbo(X, q)).item() == pytest.approx(q.kl(post).item())
    assert (WORLD.eubo(X, q) - log_p).item() == pytest.approx(post.kl(q).item())
    assert WORLD.elbo(X, q) < log_p < WORLD.eubo(X, q) < WORLD.cubo(X, q) + post.kl(q)
    for bound in (WORLD.elbo, WORLD.eubo, WORLD.cubo):
        assert bound(X, post).item() == pytest.approx(log_p.item())


def test_cubo_diverges_for_a_narrow_proposal() -> None:
    post = WORLD.posterior(X)
    assert WORLD.cubo(X, Gaussian(post.mean, 0.49 * post.covariance)).item() == math.inf
    assert WORLD.cubo(X, Gaussian(post.mean, 0.51 * post.covariance)).isfinite()


def test_gradient_of_the_elbo_at_the_posterior_is_that_of_log_p() -> None:
    post = WORLD.posterior(X)
    fixed = Gaussian(post.mean.detach(), post.covariance.detach())
    parameters = [WORLD.weight, WORLD.bias, WORLD.noise]
    direct = torch.autograd.grad(WORLD.log_marginal(X), parameters)
    through_elbo = torch.autograd.grad(WORLD.elbo(X, fixed), parameters)
    for a, b in zip(direct, through_elbo, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_estimators_agree_with_the_closed_forms() -> None:
    generator = torch.Generator().manual_seed(1)
    q = wide()
    z = q.sample(40_000, generator)
    logw = WORLD.log_weights(X, z, q).detach()
    spread = logw.std().item() / math.sqrt(len(logw))
    assert elbo(logw.unsqueeze(0)).item() == pytest.approx(WORLD.elbo(X, q).item(), abs=4 * spread)
    assert iwae(logw.unsqueeze(0)).item() == pytest.approx(WORLD.log_marginal(X).item(), abs=4 * spread)
    post_z = WORLD.posterior(X).sample(40_000, generator)
    upper = eubo(WORLD.log_weights(X, post_z, q).detach().unsqueeze(0))
    assert upper.item() == pytest.approx(WORLD.eubo(X, q).item(), abs=4 * spread)


def test_batch_of_observations() -> None:
    xs = torch.stack([X, X + 1])
    post = WORLD.posterior(xs)
    assert torch.allclose(post.mean[1], WORLD.posterior(X + 1).mean)
    assert torch.allclose(WORLD.elbo(xs, post), WORLD.log_marginal(xs))


def test_bad_input() -> None:
    with pytest.raises(UserError, match="noise .* got -1.0"):
        LinearGaussian(torch.zeros(3, 2), torch.zeros(3), torch.tensor(-1.0))
    with pytest.raises(UserError, match=r"weight \[D, d\]"):
        LinearGaussian(torch.zeros(3, 2), torch.zeros(2), torch.tensor(1.0))
