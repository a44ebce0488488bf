"""Groups without a learning signal: which they are, and what the two pure policies do with them.

The policy is part of the objective. On 0/1 rewards with r = pi and self-normalised weights, `skip` gives (1 -
(1-P)^K) grad log P on average, while `renormalise` lets the groups that had luck speak for the rest. The
policies `dataset` and `hint_retry` draw or look up other traces and belong to the trainer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from ..errors import UserError
from ..types import Coefficients
from .groups import as_groups

NullKind = Literal["no_weight", "all_equal"]


def null_groups(logw: Tensor, mask: Tensor | None = None, kind: NullKind = "no_weight") -> Tensor:
    """True `[groups]` where a group carries no signal.

    no_weight  no draw with positive weight (also: nothing drawn). For normalisers that only add.
    all_equal  all drawn weights equal, also all wrong or all right. For normalisers that subtract a baseline.
    """
    logw, mask = as_groups(logw.detach(), mask)
    if kind == "no_weight":
        return logw.isneginf().all(1)
    if kind == "all_equal":
        return logw.amax(1) <= logw.masked_fill(~mask, float("inf")).amin(1)
    raise UserError(f"kind of null group must be 'no_weight' or 'all_equal', got {kind!r}")


def null_rate(null: Tensor) -> float:
    """Share of null groups in the batch; 0 for an empty batch."""
    return float(null.float().mean()) if null.numel() else 0.0


def group_scale(null: Tensor, policy: Literal["skip", "renormalise"]) -> Tensor:
    """What to multiply each group's coefficients by, `[groups]`, in a loss that divides by all G groups.

    skip: 0 for null groups, 1 for the rest. renormalise: the rest get G / (number of the rest), which takes
    null groups out of the 1/G. All zero when every group is null.
    """
    live = (~null).float()
    if policy == "skip":
        return live
    if policy == "renormalise":
        return live * (null.numel() / live.sum().clamp(min=1))
    raise UserError(
        f"group_scale knows 'skip' and 'renormalise', got {policy!r}; other policies need the trainer"
    )


def apply_null_policy(
    coefficients: Coefficients, null: Tensor, policy: Literal["skip", "renormalise"]
) -> Coefficients:
    """The coefficients with every group multiplied by its `group_scale`, and `null` recorded."""
    scale = group_scale(null, policy)

    def scaled(c: Tensor | None) -> Tensor | None:
        return None if c is None else c * scale.to(c.dtype).reshape(-1, *[1] * (c.ndim - 1))

    return replace(
        coefficients,
        c_z=scaled(coefficients.c_z),
        c_q=scaled(coefficients.c_q),
        c_y=scaled(coefficients.c_y),
        null=null,
    )
