"""BLoB's KL divergence is that of the whole update, and where its training ends is the optimum of one ELBO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from tests.linear_parts import DOWN, Linear, Lookup, rows
from vlm_reason.weights import DiagonalGaussian, Job, Origin, Regression, Training, make_batch
from vlm_reason.weights.methods.blob import BLoB, _Elbo, noisy_layers


def posterior(r: int, n: int, prior: float) -> DiagonalGaussian:
    mean, sigma = 0.3 * torch.randn(r, n), 0.05 + 0.2 * torch.rand(r, n)
    return DiagonalGaussian({}, {"a": mean}, {"a": sigma}, Origin(prior={"a": prior**-2}))


def law_of_update(mean: Tensor, variance: Tensor, b: Tensor, s: float) -> MultivariateNormal:
    """Of vec(s B A), column by column, in coordinates of its support: an orthonormal basis of B's column space."""
    r, n = mean.shape
    basis = torch.linalg.qr(b).Q.contiguous()  # [m, r]
    to_update = s * torch.kron(
        torch.eye(n, dtype=torch.float64), basis.T @ b
    )  # vec(A) -> coordinates of vec(s B A)
    centre, scatter = mean.T.reshape(-1), torch.diag(variance.T.reshape(-1))
    return MultivariateNormal(to_update @ centre, to_update @ scatter @ to_update.T)


@pytest.mark.parametrize(("m", "n", "r"), [(3, 4, 2), (5, 2, 3), (2, 3, 1)])
def test_the_divergence_of_the_update_is_that_of_a(m: int, n: int, r: int) -> None:
    """Equation 8 of the paper, here against dense Gaussians on their support, with scaling 2."""
    q, b, prior = posterior(r, n, 0.2), torch.randn(m, r, dtype=torch.float64), 0.2
    mean, sigma = q.mean()["a"].double(), q.sigma()["a"].double()
    own = law_of_update(mean, sigma.square(), b, 2.0)
    before = law_of_update(torch.zeros_like(mean), torch.full_like(sigma, prior**2), b, 2.0)
    assert q.kl() == pytest.approx(float(kl_divergence(own, before)), rel=1e-6)


def test_the_covariance_of_the_update_is_that_of_the_paper() -> None:
    q, b = posterior(2, 3, 0.2), torch.randn(4, 2, dtype=torch.float64)
    sigma = q.sigma()["a"].double()
    blocks = [4.0 * b @ torch.diag(sigma[:, j].square()) @ b.T for j in range(3)]
    paper = torch.block_diag(*blocks)
    lifted = torch.kron(torch.eye(3, dtype=torch.float64), torch.linalg.qr(b).Q.contiguous())
    law = law_of_update(q.mean()["a"].double(), sigma.square(), b, 2.0)
    torch.testing.assert_close(lifted @ law.covariance_matrix @ lifted.T, paper)


def test_with_a_b_of_lower_rank_a_knows_more_than_the_update() -> None:
    """The KL over A is then an upper bound: directions that B maps to 0 count in it alone."""
    q = posterior(2, 3, 0.2)
    b = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    mean, sigma = q.mean()["a"].double(), q.sigma()["a"].double()
    # B A has rows proportional to the sum of A's rows: a Gaussian in 3 dimensions
    own = MultivariateNormal(mean.sum(0), torch.diag(sigma.square().sum(0)))
    before = MultivariateNormal(
        torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64) * 2 * 0.04
    )
    assert float(b.norm()) > 0
    assert q.kl() > float(kl_divergence(own, before)) + 0.1


# ------------------------------------------------------------------------------------------------------ the optimum


def rank_one(table: Tensor) -> PeftModel:
    """f = b a.x with scaling 1."""
    model = get_peft_model(
        Lookup(table, 1),  # type: ignore[arg-type]
        LoraConfig(r=1, lora_alpha=1, target_modules=["linear"]),
    )
    layer = model.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))
        layer.lora_B["default"].weight.fill_(1.0)
    return model


NU, PRIOR = 0.5, 0.7


def regression() -> tuple[Tensor, Tensor]:
    """Features [24, 3] of unequal size, and targets."""
    torch.manual_seed(3)
    table = torch.randn(24, 3) * torch.tensor([1.0, 0.5, 0.15])
    return table, table @ torch.tensor([0.8, -0.5, 0.4]) + NU * torch.randn(24)


def optimum(table: Tensor, y: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """Given B: M of ridge regression, sigma_j^2 = 1 / (1 / sigma_p^2 + b^2 sum x_j^2 / nu^2)."""
    x = table.double() * b
    precision = x.T @ x / NU**2 + torch.eye(3, dtype=torch.float64) / PRIOR**2
    return torch.linalg.solve(precision, x.T @ y.double() / NU**2), precision.diagonal().rsqrt()


def job_of(table: Tensor, y: Tensor, **training: Any) -> Job:
    likelihood = Linear(Regression(torch.ones(1), NU))
    return Job(
        rank_one(table), rows(y), likelihood, Training(warmup_share=0, max_grad_norm=0, **training), seed=1
    )


def test_the_optimum_in_closed_form_is_where_the_loss_is_flat() -> None:
    """The mean gradient there, over draws, in steps of Newton: less than 5 % of sigma for M, of G for G."""
    table, y = regression()
    job = job_of(table, y)
    mean, sigma = optimum(table, y, 1.0)
    layer = job.model.base_model.model.linear
    m, root = layer.lora_A["default"].weight, nn.Parameter(sigma.sqrt().float()[None])
    with torch.no_grad():
        m.copy_(mean[None])
    (name,) = noisy_layers(job.model, "default")
    prior = {name: (torch.zeros(()), torch.tensor(PRIOR))}
    loss = _Elbo(BLoB(prior_sigma=PRIOR), job, {name: m}, {name: root}, prior)
    batch, count = make_batch(job.train), 700
    for loss.step in range(count):
        loss(job.model, batch, job.likelihood).backward()
    assert m.grad is not None and root.grad is not None
    # second derivatives of the loss: 1 / (N sigma^2) in M; in G with sigma = G^2 at the optimum, 8 / (N G^2)
    step = m.grad[0] / count * 24 * sigma
    assert float(step.abs().max()) < 0.05
    relative = root.grad[0] / count * 24 * root.detach()[0] / 8
    assert float(relative.abs().max()) < 0.05


def test_training_ends_at_the_optimum_and_reports_its_elbo() -> None:
    table, y = regression()
    job = job_of(table, y, epochs=200, batch_size=24, learning_rate=0.04)
    q, report = BLoB(prior_sigma=PRIOR, init=0.5, samples=4, sigma_learning_rate=0.04).fit(job)
    assert isinstance(q, DiagonalGaussian)
    b = job.model.base_model.model.linear.lora_B["default"].weight.item()
    mean, sigma = optimum(table, y, b)
    found, spread = q.mean()[DOWN][0].double(), q.sigma()[DOWN][0].double()
    torch.testing.assert_close(spread / sigma, torch.ones(3).double(), rtol=0.12, atol=0)
    assert float(((found - mean) / sigma).abs().max()) < 0.25
    x = table.double() * b
    errors = (y.double() - x @ found).square() + x.square() @ spread.square()
    nll = float(errors.mean()) / (2 * NU**2) + math.log(NU * math.sqrt(2 * math.pi))
    assert report.details["kl"] == pytest.approx(q.kl(), rel=1e-4)
    assert report.details["nll"] == pytest.approx(nll, abs=0.05)
    assert report.details["elbo"] == pytest.approx(-nll - q.kl() / 24, abs=0.05)
