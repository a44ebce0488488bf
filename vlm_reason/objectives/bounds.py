"""Bounds on log p(y*|x) from K weighted draws of a group, each with the side it lies on and the draws it
needs.

    w_k = pi(z_k|x) e(z_k) / r(z_k),      E_r[w] = p,       log p = log sum_z pi(z|x) e(z)

| function     | draws from          | K-draw value                    | side of log p                                 |
|--------------|---------------------|---------------------------------|-----------------------------------------------|
| elbo         | r                   | mean_k log w                    | below, in expectation                         |
| iwae         | r                   | log mean_k w                    | below, in expectation; rises with K           |
| renyi a >= 0 | r                   | log mean_k w^(1-a) / (1-a)      | below, in expectation (a power mean <= iwae)  |
| cubo n > 1   | r                   | log mean_k w^n / n              | above as an exact sum; **not at finite K**    |
| eubo         | the exact posterior | mean_k log w                    | above, in expectation                         |

All take `logw [groups, K]` and an optional bool `mask` (see groups.py) and return `[groups]`, differentiable
in `logw`. A group in which nothing was drawn gets the bound that says nothing: -inf from below, +inf from
above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from .groups import NEG_INF, as_groups, drawn, log_mean_exp, masked_mean


def log_weights(
    logp_prior: Tensor, logp_evidence: Tensor, logq: Tensor, mask: Tensor | None = None
) -> Tensor:
    """log w = log pi(z|x) + log e(z) - log r(z), all `[groups, K]`, in nats.

    `logq` is log r, the density that really drew z (the mixture density if a mixture drew it). A prior or
    evidence of -inf gives -inf, and so does a masked entry. Raises UserError where a drawn trace has r(z) =
    0: it cannot have been drawn from r.
    """
    prior, mask = as_groups(logp_prior, mask, "logp_prior")
    evidence, _ = as_groups(logp_evidence, mask, "logp_evidence")
    density, _ = as_groups(logq, mask, "logq")
    impossible = mask & density.isneginf()
    if bool(impossible.any()):
        group, k = impossible.nonzero()[0].tolist()
        raise UserError(
            f"logq[{group}, {k}] is -inf for a drawn trace: it has probability 0 under the law said to have drawn it; "
            "score it under the law that sampled it, or mask it"
        )
    joint = prior + evidence
    zero = joint.isneginf() | ~mask
    return (joint.masked_fill(zero, 0.0) - density.masked_fill(zero, 0.0)).masked_fill(zero, NEG_INF)


def elbo(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """Evidence lower bound: mean_k log w_k, draws from r. E[elbo] = log p - KL(r || posterior) <= log p.

    One draw of weight 0 makes it -inf: with sampled accuracy as evidence use `iwae`. Empty group: -inf.
    Jordan et al. 1999.
    """
    logw, mask = as_groups(logw, mask)
    zero = (logw.isneginf() & mask).any(1) | ~mask.any(1)
    return masked_mean(logw.masked_fill(logw.isneginf(), 0.0), mask).masked_fill(zero, NEG_INF)


def iwae(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """Importance-weighted bound: L_K = log (1/K) sum_k w_k, draws from r. E[L_K] <= E[L_(K+1)] <= log p.

    Report it at a fixed K: groups of different K estimate different bounds. -inf when no draw has weight, and
    for an empty group. Burda, Grosse & Salakhutdinov 2016 (arXiv 1509.00519).
    """
    logw, mask = as_groups(logw, mask)
    return log_mean_exp(logw, mask)


def cubo(logw: Tensor, order: float = 2, mask: Tensor | None = None) -> Tensor:
    """Chi upper bound: (1/n) log (1/K) sum_k w_k^n for order n >= 1, draws from r.

    The exact (1/n) log E_r[w^n] >= log p. **The K-draw value is not an upper bound**: the log of a mean is
    low on average, often by more than the gap. Use it as a training signal for r or on enumerated sums; for
    an upper bound from draws use `eubo`. Empty group: +inf. Dieng et al. 2017 (arXiv 1611.00328). Raises
    UserError for order < 1.
    """
    if not order >= 1 or math.isinf(order):
        raise UserError(
            f"order of cubo must be a finite number >= 1, got {order}; below 1 it is no upper bound"
        )
    logw, mask = as_groups(logw, mask)
    value = log_mean_exp(order * logw, mask) / order
    return value.masked_fill(~mask.any(1), math.inf)


def eubo(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """Evidence upper bound: mean_k log w_k over draws **from the exact posterior** p(z|x,y*).

    E[eubo] = log p + KL(posterior || r) >= log p, where r is the density in the denominator of w. With draws
    from r itself the same mean is the ELBO. A posterior draw cannot have weight 0; if one has, the draws were
    not from the posterior and nothing bounds log p: +inf, as for an empty group.
    """
    logw, mask = as_groups(logw, mask)
    invalid = (logw.isneginf() & mask).any(1) | ~mask.any(1)
    return masked_mean(logw.masked_fill(logw.isneginf(), 0.0), mask).masked_fill(invalid, math.inf)


def renyi(logw: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
    """Variational Renyi bound: log (1/K) sum_k w_k^(1-alpha) / (1-alpha), draws from r.

    alpha 1 is the ELBO, 0 the IWAE bound, 1 - n the CUBO of order n; +inf and -inf are the smallest and the
    largest log w. It falls with alpha. For alpha >= 0 it never exceeds `iwae` of the same draws, so its
    expectation is below log p at every K; for alpha < 0 it is an upper bound only as an exact sum (see
    `cubo`). A draw of weight 0 makes it -inf for alpha >= 1. Empty group: -inf for alpha >= 0, +inf for alpha
    < 0. Li & Turner 2016 (arXiv 1602.02311). Raises UserError for alpha NaN.
    """
    if math.isnan(alpha):
        raise UserError("alpha of renyi is nan; give a number (1 = ELBO, 0 = IWAE)")
    empty_value = math.inf if alpha < 0 else NEG_INF
    logw, mask = as_groups(logw, mask)
    if alpha == 1:
        value = elbo(logw, mask)
    elif alpha == -math.inf:
        value = logw.amax(1)
    elif alpha == math.inf:
        value = logw.masked_fill(~mask, math.inf).amin(1)
    else:
        value = _power_mean(logw, mask, 1 - alpha)
    return value.masked_fill(~mask.any(1), empty_value)


def _power_mean(logw: Tensor, mask: Tensor, n: float) -> Tensor:
    """(1/n) log mean_k w_k^n for finite n != 0."""
    zero_draw = (logw.isneginf() & mask).any(1)
    scaled = (n * logw.masked_fill(logw.isneginf(), 0.0)).masked_fill(logw.isneginf(), NEG_INF)
    if abs(n) >= 1e-2:
        value = log_mean_exp(scaled, mask) / n
    else:
        # log mean exp cancels against log K as n -> 0; expm1 about the mean keeps the digits.
        null = logw.isneginf().all(1, keepdim=True)
        top = scaled.detach().amax(1, keepdim=True).masked_fill(null, 0.0)
        excess = torch.expm1(scaled - top).masked_fill(~mask | null, 0.0).sum(1) / drawn(mask).to(logw.dtype)
        value = ((top.squeeze(1) + torch.log1p(excess)) / n).masked_fill(null.squeeze(1), NEG_INF)
    return value.masked_fill(zero_draw, NEG_INF) if n < 0 else value
