"""Leave-one-out baselines: for draw k, a statistic of the other draws of its group.

A baseline that does not depend on z_k leaves E[(signal_k - baseline_k) grad log r(z_k)] unchanged and shrinks
its variance. With fewer than two draws there are no others: the baseline is then 0, which is independent of
z_k as well, so the estimate stays unbiased and keeps its variance. Masked entries are nobody's "other", and
their baseline is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .groups import NEG_INF, as_groups, as_values, drawn, log_mean_exp


def leave_one_out_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """b_k = mean_{j != k} v_j, `[groups, K]`, of finite rewards. Kool, van Hoof & Welling 2019; RLOO
    (2402.14740)."""
    values, mask = as_values(values, mask, "values")
    others = (drawn(mask) - 1).clamp(min=1).to(values.dtype).unsqueeze(1)
    baseline = (values.sum(1, keepdim=True) - values) / others
    return baseline.masked_fill(_undefined(mask), 0.0)


def leave_one_out_log_mean_exp(logw: Tensor, mask: Tensor | None = None) -> Tensor:
    """b_k = log mean_{j != k} w_j, `[groups, K]`, from log w. -inf where every other draw has weight 0.

    Computed from prefix and suffix log-sums: subtracting w_k from the total would cancel when w_k dominates.
    """
    logw, mask = as_groups(logw, mask)
    outside = logw.new_full((logw.shape[0], 1), NEG_INF)
    before = torch.cat([outside, logw.logcumsumexp(1)[:, :-1]], 1)
    after = torch.cat([logw.flip(1).logcumsumexp(1).flip(1)[:, 1:], outside], 1)
    others = (drawn(mask) - 1).clamp(min=1).to(logw.dtype).unsqueeze(1)
    return (torch.logaddexp(before, after) - others.log()).masked_fill(_undefined(mask), 0.0)


def vimco_baseline(
    logw: Tensor, mask: Tensor | None = None, stand_in: Literal["arithmetic", "geometric"] = "arithmetic"
) -> Tensor:
    """VIMCO's estimate of L_K without draw k, `[groups, K]`:

        b_k = log (1/K) [ sum_{j != k} w_j + s_k ],   s_k = mean of the other w_j

    The arithmetic mean gives b_k = log mean_{j != k} w_j; the geometric one is what Mnih & Rezende 2016
    (arXiv 1602.06725) prefer, at no gain when weights can be 0 (s_k is then 0). Where every other draw has
    weight 0, or there is none, the baseline is 0: constant, hence still unbiased. Never -inf.
    """
    baseline = _without_own_draw(*as_groups(logw, mask), stand_in)
    return baseline.masked_fill(baseline.isneginf(), 0.0)


def vimco_signal(
    logw: Tensor, mask: Tensor | None = None, stand_in: Literal["arithmetic", "geometric"] = "arithmetic"
) -> Tensor:
    """Score-function signal of the IWAE bound, log mean_j w_j - b_k, `[groups, K]`; b_k from
    `vimco_baseline`.

    E sum_k signal_k grad log r(z_k) = E sum_k L_K grad log r(z_k). 0 for a null group (all weights 0: the
    bound is -inf there and has no gradient) and at masked entries.
    """
    logw, mask = as_groups(logw, mask)
    top = logw.amax(1, keepdim=True)
    null = top.isneginf()
    # Relative to the largest weight: the difference of two log-sums near -3000 would cost four digits in fp32.
    top = top.masked_fill(null, 0.0)
    bound = log_mean_exp(logw - top, mask).unsqueeze(1).masked_fill(null, 0.0)
    baseline = _without_own_draw(logw - top, mask, stand_in)
    none = baseline.isneginf()
    signal = torch.where(none, bound + top, bound - baseline.masked_fill(none, 0.0))
    return signal.masked_fill(null | ~mask, 0.0)


def _without_own_draw(logw: Tensor, mask: Tensor, stand_in: str) -> Tensor:
    """VIMCO's b_k of checked log weights; -inf where there are no other draws or all of them have weight 0."""
    if stand_in not in ("arithmetic", "geometric"):
        raise UserError(f"stand_in of vimco_baseline must be 'arithmetic' or 'geometric', got {stand_in!r}")
    arithmetic = leave_one_out_log_mean_exp(logw, mask).masked_fill(_undefined(mask), NEG_INF)
    if stand_in == "arithmetic":
        return arithmetic
    count = drawn(mask).to(logw.dtype).unsqueeze(1)
    zero = logw.isneginf() & mask
    other_zero = (zero.sum(1, keepdim=True) - zero.long()) > 0
    log_s = leave_one_out_mean(logw.masked_fill(logw.isneginf(), 0.0), mask).masked_fill(other_zero, NEG_INF)
    log_sum_others = arithmetic + (count - 1).clamp(min=1).log()
    return (torch.logaddexp(log_sum_others, log_s) - count.log()).masked_fill(_undefined(mask), NEG_INF)


def _undefined(mask: Tensor) -> Tensor:
    """Where there is no other draw to average, or no draw at all."""
    return ~mask | (mask.sum(1, keepdim=True) < 2)
