"""The handful of steps that presets' `weigh` functions are made of: pure, on `Scores`, detached."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Scores


def rewards(scores: Scores) -> Tensor:
    """e(z) = exp(log e), [G, K]; 0 where nothing was drawn."""
    return scores.log_evidence.exp().masked_fill(~scores.mask, 0.0)


def log_ratio(scores: Scores) -> Tensor:
    """l = log pi(z|x) - log r(z), [G, K], nats."""
    return scores.logp_prior - scores.logq


def drawn(scores: Scores) -> Tensor:
    """K of each group as a column, [G, 1]."""
    return scores.mask.sum(1, keepdim=True).clamp(min=1).to(scores.log_evidence.dtype)


def per_answer(c_z: Tensor, scores: Scores) -> Tensor:
    """c_y [G, K, M]: a trace's coefficient shared equally by its right answers (all of it if there is one).
    With the accuracy evidence this is grad log pi(Y_x|x,z) estimated from the right answers already drawn:

        E[1[y right] grad log pi(y|x,z)] / E[1[y right]]
    """
    right = scores.answer_weight
    return c_z.unsqueeze(-1) * right / right.sum(-1, keepdim=True).clamp(min=torch.finfo(right.dtype).tiny)


def every_answer(c: Tensor, scores: Scores) -> Tensor:
    """c_y [G, K, M] = c / M on every answer target, right or wrong (policy-gradient methods)."""
    m = scores.logp_answer.shape[-1]
    return (c / m).unsqueeze(-1).expand(-1, -1, m).contiguous()


def no_signal(*coefficients: Tensor) -> Tensor:
    """[G]: True where all of a group's coefficients are 0."""
    return torch.stack([(c.reshape(len(c), -1) == 0).all(1) for c in coefficients]).all(0)
