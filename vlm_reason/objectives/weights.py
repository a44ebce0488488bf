"""Importance weights of a group: the coefficients that the gradients of the bounds put on each draw.

    d/d theta  L_K    = E sum_k rho_k           d log [pi(z_k|x) e(z_k)]       rho   = w / sum w
    self_normalised d/d phi    L_K    = E sum_k (L_K - rho_k)   d log q(z_k)
    iwae_score_weights d/d phi    CUBO_n = -(n-1)/n E[w^n d log q] / E[w^n]                       rho_n = w^n
    / sum w^n   forward_chi2_weights

Everything here is a number for the loss, not something to differentiate: results are detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .groups import as_groups, log_mean_exp
from .leave_one_out import vimco_signal


def self_normalised(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """rho_k = w_k / sum_j w_j, `[groups, K]`, each row summing to 1.

    A null group (no draw with weight) and an empty one get zeros. Biased O(1/K) as an estimate of the
    posterior expectation. Reweighted wake-sleep, Bornschein & Bengio 2015.
    """
    logw, _ = as_groups(logw.detach(), mask)
    null = logw.isneginf().all(1, keepdim=True)
    return logw.masked_fill(null, 0.0).softmax(1).masked_fill(null, 0.0)


def forward_chi2_weights(logw: Tensor, mask: Tensor | None = None, order: float = 2) -> Tensor:
    """w_k^n / sum_j w_j^n, `[groups, K]`: weights on log q that descend the chi-square divergence posterior
    || q.

    Minimising CUBO_n in phi follows (n-1)/n times these weights (the constant is left to the step size).
    Draws from q; covers modes, and leans on the largest weight harder than `self_normalised` (n = 1): watch
    `effective_sample_size`. Null and empty groups get zeros. Dieng et al. 2017.
    """
    if not order >= 1:
        raise UserError(f"order of forward_chi2_weights must be >= 1, got {order}")
    logw, mask = as_groups(logw.detach(), mask)
    return self_normalised(order * logw, mask)


def iwae_score_weights(logw: Tensor, mask: Tensor | None = None, vimco: bool = True) -> Tensor:
    """Coefficients of log q(z_k) in the score-function gradient of the IWAE bound, `[groups, K]`:

        c_k = log mean_j w_j - b_k - rho_k

    b_k is `vimco_baseline`, or 0 with vimco=False; the expectation is the same. The signal-to-noise ratio
    falls with K (Rainforth et al. 2018): for large K train q by forward KL (`self_normalised`) instead. Null
    group: zeros.
    """
    logw, mask = as_groups(logw.detach(), mask)
    if vimco:
        signal = vimco_signal(logw, mask)
    else:
        bound = log_mean_exp(logw, mask).unsqueeze(1)
        signal = bound.masked_fill(bound.isneginf(), 0.0).expand_as(logw).masked_fill(~mask, 0.0)
    return signal - self_normalised(logw, mask)


def effective_sample_size(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """(sum w)^2 / sum w^2, `[groups]`, between 1 and K: near 1 means best-of-K, K means all weights are
    equal.

    0 for null and empty groups. Blind to modes that no draw has hit; see `pareto_k`. Kong 1992.
    """
    rho = self_normalised(logw, mask)
    square = rho.square().sum(1)
    null = square == 0
    return (1 / square.masked_fill(null, 1.0)).masked_fill(null, 0.0)


def max_weight(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """max_k rho_k, `[groups]`: the share of the update that one trace carries. 0 for null and empty
    groups."""
    return self_normalised(logw, mask).amax(1)


def weight_length_correlation(logw: Tensor, length: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pearson correlation of rho_k with the number of tokens in z_k over the drawn traces, `[groups]`.

    A full likelihood ratio tends to favour short traces; this shows by how much. 0 where it is undefined
    (fewer than two draws, or no variation in weight or length).
    """
    if length.shape != logw.shape:
        raise UserError(f"length must have the shape of logw {list(logw.shape)}, got {list(length.shape)}")
    logw, mask = as_groups(logw.detach(), mask)
    rho, tokens = self_normalised(logw, mask), length.detach().to(logw.dtype)
    count = mask.sum(1, keepdim=True).clamp(min=1).to(logw.dtype)

    def centred(values: Tensor) -> Tensor:
        values = values.masked_fill(~mask, 0.0)
        return (values - values.sum(1, keepdim=True) / count).masked_fill(~mask, 0.0)

    rho, tokens = centred(rho), centred(tokens)
    scale = rho.norm(dim=1) * tokens.norm(dim=1)
    # Equal weights differ by rounding alone; below this the correlation would be that of rounding errors.
    flat = (rho.norm(dim=1) <= 1e-6) | (tokens.norm(dim=1) <= 1e-6)
    covariance = (rho * tokens).sum(1)
    return torch.where(flat, torch.zeros_like(scale), covariance / scale.masked_fill(flat, 1.0)).clamp(-1, 1)
