"""Bayesian last layer for classification: y ~ softmax(f), f_c ~ N(m_c, v_c), independent.

E log softmax_y(f) has no closed form for C > 2. What stands for it, from the loosest up:

    jensen        m_y - log sum_c exp(m_c + v_c / 2), a lower bound (Harrison, Willes and Snoek 2024)
    monte_carlo   mean over draws of f, unbiased
    quadrature    C = 2: E log sigma(f_y - f_other), one dimension, exact to rounding

    E softmax(f) is about softmax(m / sqrt(1 + pi v / 8))         probit, no draws; monte_carlo draws f
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .quadrature import NODES, expectation

Bound = Literal["jensen", "monte_carlo"]
BOUNDS: tuple[str, ...] = get_args(Bound)
Normals = Callable[[tuple[int, ...]], Tensor]
"""Standard normals of a shape."""


def jensen_bound(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Lower bound [B] on E log softmax_y(f), of [B, C] and target [B]. Loose where variances are large: -.94 for -.78
    is usual; a posterior fitted to it is too sure."""
    chosen = mean.gather(-1, target[:, None]).squeeze(-1)
    return chosen - (mean + variance / 2).logsumexp(-1)


def expected_log_softmax(
    mean: Tensor, variance: Tensor, target: Tensor, draws: int = 8, normals: Normals = torch.randn
) -> Tensor:
    """E log softmax_y(f) [B]: by quadrature for two classes, else the mean over `draws` draws, in opposite pairs."""
    if mean.shape[-1] == 2:
        return two_class_quadrature(mean, variance, target)
    half = normals((max(1, draws // 2), *mean.shape)).to(mean)
    noise = torch.cat([half, -half])
    logp = (mean + variance.sqrt() * noise).log_softmax(-1)
    return logp.mean(0).gather(-1, target[:, None]).squeeze(-1)


def two_class_quadrature(mean: Tensor, variance: Tensor, target: Tensor, nodes: int = NODES) -> Tensor:
    """E log sigma(f_y - f_other) [B], of [B, 2]; the difference is N(m_y - m_other, v_y + v_other)."""
    sign = 1.0 - 2.0 * target.to(mean.dtype)
    return expectation(F.logsigmoid, sign * (mean[:, 0] - mean[:, 1]), variance.sum(-1), nodes)


def probit(mean: Tensor, variance: Tensor) -> Tensor:
    """E softmax(f) [..., C], approximately (MacKay 1992): exact where all variances are 0, and a shrinking of every
    logit by its own variance."""
    return (mean / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)
