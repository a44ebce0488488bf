"""Bayesian last layer for regression: y_c = w_c . phi + noise, noise ~ N(0, sigma_c^2).

    E_q log N(y; w . phi, sigma^2) = log N(y; mu . phi, sigma^2) - phi^T S phi / (2 sigma^2)

With a Gaussian prior this is conjugate: with S full the ELBO at its best equals the evidence. Several outputs are
so many regressions: the loss is their sum, each with its own noise (Harrison, Willes and Snoek 2024, for one output).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .covariance import DENSE_UP_TO


def expected_log_normal(mean: Tensor, variance: Tensor, target: Tensor, noise_variance: Tensor) -> Tensor:
    """E log N(y; f, sigma^2) under f_c ~ N(mean_c, variance_c), summed over outputs: [B] of [B, C], target [B, C],
    noise_variance [C]."""
    squared = (target - mean).square() + variance
    return -(squared / noise_variance + (2 * math.pi * noise_variance).log()).sum(-1) / 2


def best_noise(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """The noise variances [C] with the largest expected log-likelihood: mean of (y - mu . phi)^2 + phi^T S phi."""
    return ((target - mean).square() + variance).mean(0).clamp_min(1e-8)


def ridge(phi: Tensor, target: Tensor, noise_variance: Tensor, prior_variance: float) -> Tensor:
    """Posterior means [C, F] of phi [N, F], target [N, C]: the minimiser of |y - Phi w|^2 / sigma^2 + |w|^2 / s^2."""
    n, size = phi.shape
    rows = []
    for c, sigma2 in enumerate(noise_variance):
        weight = sigma2 / prior_variance
        if size <= max(n, DENSE_UP_TO):
            gram = phi.mT @ phi + weight * torch.eye(size, dtype=phi.dtype, device=phi.device)
            rows.append(torch.linalg.solve(gram, phi.mT @ target[:, c]))
        else:
            gram = phi @ phi.mT + weight * torch.eye(n, dtype=phi.dtype, device=phi.device)
            rows.append(phi.mT @ torch.linalg.solve(gram, target[:, c]))
    return torch.stack(rows)


def log_evidence(phi: Tensor, target: Tensor, noise_variance: Tensor, prior_variance: float) -> Tensor:
    """log p(Y | Phi), nats: sum_c log N(y_c; 0, sigma_c^2 I + s^2 Phi Phi^T). O(N^3): for checks."""
    total = phi.new_zeros(())
    for c, sigma2 in enumerate(noise_variance):
        k = prior_variance * phi @ phi.mT + sigma2 * torch.eye(len(phi), dtype=phi.dtype, device=phi.device)
        root = torch.linalg.cholesky(k)
        solved = torch.linalg.solve_triangular(root, target[:, c, None], upper=False)
        total = total - (solved.square().sum() + len(phi) * math.log(2 * math.pi)) / 2
        total = total - root.diagonal().log().sum()
    return total
