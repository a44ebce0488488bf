"""What every objective shares: a group is a row of log weights, and this is what its entries may be.

    finite   drawn, with weight exp(log w)
    -inf     drawn, with weight 0; it counts in K (a wrong or truncated trace)
    masked   never drawn; it does not exist (a short group, padding)

Reductions run in fp32 (in fp64 if given fp64), keep everything in log space and never return NaN, nor let one
into a gradient. NaN or +inf among the drawn entries is a defect upstream and raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

NEG_INF = float("-inf")


def as_mask(values: Tensor, mask: Tensor | None, name: str = "logw") -> Tensor:
    """The bool mask of a [groups, K] tensor, all True when none is given. Raises UserError on a wrong shape
    or type."""
    if values.ndim != 2 or values.shape[1] < 1:
        raise UserError(f"{name} must be [groups, K] with K >= 1, got shape {list(values.shape)}")
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise UserError(
            f"mask must be bool of shape {list(values.shape)} like {name}, "
            f"got {mask.dtype} of shape {list(mask.shape)}"
        )
    return mask


def as_groups(logw: Tensor, mask: Tensor | None = None, name: str = "logw") -> tuple[Tensor, Tensor]:
    """Checked log weights in fp32 (fp64 stays), masked entries set to -inf, and the mask.

    Raises UserError for a tensor that is not [groups, K], and for NaN or +inf among the drawn entries.
    """
    mask = as_mask(logw, mask, name)
    logw = logw if logw.dtype == torch.float64 else logw.float()
    bad = mask & (logw.isnan() | logw.isposinf())
    if bool(bad.any()):
        group, k = bad.nonzero()[0].tolist()
        raise UserError(
            f"{name}[{group}, {k}] is {logw[group, k].item()}: a log weight is finite, or -inf for weight 0 "
            "(mask what was never drawn)"
        )
    return logw.masked_fill(~mask, NEG_INF), mask


def drawn(mask: Tensor) -> Tensor:
    """K of each group, [groups]: how many entries were drawn. At least 1, so that it can divide."""
    return mask.sum(1).clamp(min=1)


def log_sum_exp(logw: Tensor) -> Tensor:
    """log sum_k exp(log w_k) over the last axis; -inf with gradient 0 (torch: NaN) where every weight is
    0."""
    null = logw.isneginf().all(-1, keepdim=True)
    return torch.logsumexp(logw.masked_fill(null, 0.0), -1).masked_fill(null.squeeze(-1), NEG_INF)


def log_mean_exp(logw: Tensor, mask: Tensor) -> Tensor:
    """log (1/K) sum_k w_k over the K drawn entries, [groups]. `logw` is -inf wherever masked."""
    return log_sum_exp(logw) - drawn(mask).to(logw.dtype).log()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the drawn entries, [groups]; 0 for an empty group. Values behind the mask are never read."""
    return values.masked_fill(~mask, 0.0).sum(1) / drawn(mask).to(values.dtype)


def as_values(values: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Rewards rather than log weights: every drawn entry must be finite. fp32 (fp64 stays), 0 behind the
    mask."""
    mask = as_mask(values, mask, name)
    values = values if values.dtype == torch.float64 else values.float()
    bad = mask & ~values.isfinite()
    if bool(bad.any()):
        group, k = bad.nonzero()[0].tolist()
        raise UserError(f"{name}[{group}, {k}] is {values[group, k].item()}, but must be finite")
    return values.masked_fill(~mask, 0.0), mask
