"""Pareto-smoothed importance sampling: how heavy the tail of a group's weights is, and a smoothed version of
them.

The M = min(0.2 K, 3 sqrt(K)) largest weights above the next one are fitted by a generalised Pareto law

    P(w - u > t) = (1 + k t / sigma)^(-1/k)

The shape k says what the draws can carry: k < 0.5 finite variance; k < 0.7 usable with the smoothing; above
that, estimates from these draws are not to be trusted at any realistic K. Vehtari, Simpson, Gelman, Yao &
Gabry 2024 (arXiv 1507.02646), with the fit of Zhang & Stephens 2009 and the prior that draws k towards 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .groups import as_groups

MIN_DRAWS = 25
"""Below this the tail has fewer than five draws, and nothing can be fitted to it."""

MIN_TAIL = 5


@dataclass(frozen=True)
class Psis:
    """logw [groups, K]  log weights with the tail smoothed, on the scale of the input (mean w still estimates
    p). k       [groups]     Pareto shape; NaN where `too_few`. too_few [groups]     True where fewer than 25
    draws were made: no k, weights unchanged."""

    logw: Tensor
    k: Tensor
    too_few: Tensor


def fit_psis(logw: Tensor, mask: Tensor | None = None) -> Psis:
    """Fit and smooth every group. Detached.

    Besides the fitted values k is -inf where the largest weights are all equal (bounded weights: nothing is
    heavy) and +inf where fewer than five draws stand above the rest (all is in the tail); the weights are
    then unchanged.
    """
    logw, mask = as_groups(logw.detach(), mask)
    k = logw.new_full((logw.shape[0],), math.nan)
    too_few = mask.sum(1) < MIN_DRAWS
    smoothed = logw.clone()
    for g in (~too_few).nonzero().flatten().tolist():
        row, where = logw[g], mask[g]
        values, shape = _smooth(row[where].double().cpu())
        smoothed[g] = smoothed[g].masked_scatter(where, values.to(row))
        k[g] = shape
    return Psis(smoothed, k, too_few)


def pareto_k(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """The Pareto shape k of each group's weights, `[groups]`; NaN with fewer than 25 draws
    (`fit_psis(...).too_few`)."""
    return fit_psis(logw, mask).k


def psis_smooth(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log weights with the fitted tail replaced by its expected order statistics, `[groups, K]`,
    unnormalised.

    None exceeds the largest raw weight. A group with fewer than 25 draws, or without a tail to fit, is
    returned as it came: see `fit_psis` for which.
    """
    return fit_psis(logw, mask).logw


def fit_generalised_pareto(excess: Tensor) -> tuple[float, float]:
    """(k, sigma) of positive exceedances `[n]`, n >= 5, by the profile posterior mean of Zhang & Stephens
    2009, with k shrunk towards 0.5 as by ten further draws. Positive k means a heavy tail (their k is minus
    ours)."""
    if excess.numel() < MIN_TAIL or not bool((excess > 0).all()):
        raise UserError(f"a Pareto fit needs at least {MIN_TAIL} exceedances > 0, got {excess.numel()}")
    x = excess.double().sort().values
    n = x.numel()
    grid = 30 + int(math.sqrt(n))
    steps = torch.arange(1, grid + 1, dtype=torch.float64) - 0.5
    quartile = x[int(n / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - (grid / steps).sqrt()) / (3 * quartile)
    shape = torch.log1p(-theta.unsqueeze(1) * x).mean(1)
    log_profile = n * ((-theta / shape).log() - shape - 1)
    weight = log_profile.softmax(0)
    theta_mean = (weight * theta).sum()
    k = torch.log1p(-theta_mean * x).mean()
    sigma = -k / theta_mean
    return float((n * k + 10 * 0.5) / (n + 10)), float(sigma)


def _smooth(logw: Tensor) -> tuple[Tensor, float]:
    count = logw.numel()
    order = logw.argsort(stable=True)
    ordered = logw[order]
    tail_size = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    cutoff, top = ordered[-tail_size - 1], ordered[-1]
    if top == -math.inf:
        return logw, math.inf
    # Scaled by the largest weight, so that exp neither over- nor underflows at the top.
    excess = (ordered[-tail_size:] - top).exp() - (cutoff - top).exp()
    above = excess > 0
    tail = int(above.sum())
    if bool((ordered[-tail_size:] == top).all()):
        return logw, -math.inf
    if tail < MIN_TAIL:
        return logw, math.inf
    k, sigma = fit_generalised_pareto(excess[above])
    quantile = (torch.arange(1, tail + 1, dtype=torch.float64) - 0.5) / tail
    fitted = _pareto_quantile(quantile, k, sigma)
    smoothed = ((fitted + (cutoff - top).exp()).log() + top).clamp(max=top.item())
    result = logw.clone()
    result[order[-tail:]] = smoothed
    return result, k


def _pareto_quantile(probability: Tensor, k: float, sigma: float) -> Tensor:
    if abs(k) < 1e-12:
        return -sigma * torch.log1p(-probability)
    return sigma * torch.expm1(-k * torch.log1p(-probability)) / k
