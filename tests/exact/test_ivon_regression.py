"""IVON against the mean-field optimum of Bayesian linear regression, which is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlm_reason.weights import IVON

N, D, DELTA, RUNS = 200, 6, 0.05, 64


def problem() -> tuple[Tensor, Tensor]:
    """Correlated features, so that the mean-field optimum is not the marginal of the exact posterior. With noise
    variance 1 the mean loss is (theta - theta*)^T A (theta - theta*) / 2 + const."""
    torch.manual_seed(3)
    x = torch.randn(N, D) @ (torch.eye(D) + 0.4 * torch.ones(D, D))
    y = x @ torch.randn(D) + torch.randn(N)
    return x.T @ x / N, x.T @ y / N


def fit(dtype: torch.dtype, mc_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, sigma) of IVON, averaged over independent runs and the last third, and the optimum's."""
    a, b = problem()
    theta = torch.nn.Parameter(torch.zeros(RUNS, D, dtype=dtype))
    optimizer = IVON(
        [theta], lr=0.03, ess=N, hess_init=1.0, beta2=0.996, weight_decay=DELTA, mc_samples=mc_samples, seed=1
    )
    means, precisions = [], []
    for step in range(2100 * mc_samples):
        theta.grad = (theta.detach().float() @ a - b).to(dtype)
        optimizer.step()
        if step > 1500 * mc_samples:
            state = optimizer.state[theta]
            means.append(state["mean"].mean(0))
            precisions.append(N * state["precision"].mean(0))
    m = torch.linalg.solve(a + DELTA * torch.eye(D), b)
    sigma = (N * (a.diagonal() + DELTA)).rsqrt()
    return torch.stack(means).mean(0), torch.stack(precisions).mean(0).rsqrt(), m, sigma


@pytest.mark.parametrize(
    ("dtype", "mc_samples", "width"),
    [(torch.float32, 1, 0.03), (torch.float32, 2, 0.03), (torch.bfloat16, 1, 0.05)],
)
def test_mean_and_precision_reach_the_mean_field_optimum(
    dtype: torch.dtype, mc_samples: int, width: float
) -> None:
    mean, sigma, m, exact = fit(dtype, mc_samples)
    assert ((mean - m) / exact).abs().max() < 0.05
    assert (sigma / exact - 1).abs().max() < width
    a, _ = problem()
    marginal = torch.linalg.inv(N * (a + DELTA * torch.eye(D))).diagonal().sqrt()
    assert (marginal / sigma).min() > 1.2  # q factorises: narrower than the exact marginal
