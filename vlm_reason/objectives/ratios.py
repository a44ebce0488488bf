"""Stabilisers of the log ratio l = log pi(z|x) - log r(z), the part of log w = log e + l that explodes with
length.

The sum over hundreds of tokens makes l the loudest term: with the full ratio one trace soon carries the whole
group (`effective_sample_size` near 1). Each stabiliser trades that variance for a bias, stated with it. With
an exponent alpha the target becomes r (pi/r)^alpha e, which is the posterior only for alpha = 1.

All are called as `ratio(log_ratio, log_evidence, length, mask) -> [groups, K]`, on `[groups, K]` tensors
(length in tokens). A drawn ratio of -inf (impossible under pi) stays -inf, except under `zero`; masked
entries come back as -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .groups import NEG_INF, as_groups, drawn
from .psis import MIN_DRAWS, psis_smooth
from .weights import effective_sample_size


class Ratio(Protocol):
    def __call__(
        self, log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None
    ) -> Tensor: ...


def none(log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None) -> Tensor:
    """l itself: the only one without bias. When its ESS is poor, change the proposal before the ratio."""
    return as_groups(log_ratio, mask, "log_ratio")[0]


def zero(log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None) -> Tensor:
    """0: every draw as if r were pi. Exact when r is pi; else the fixed point is the r-weighted posterior r
    e."""
    ratio, mask = as_groups(log_ratio, mask, "log_ratio")
    return torch.zeros_like(ratio).masked_fill(~mask, NEG_INF)


def per_token(log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None) -> Tensor:
    """l / |z|, the mean log ratio per token (arXiv 2509.22637). Weights end up within a percent or so of
    equal on traces of thousands of tokens: close to no ratio at all, and what it knew is gone."""
    return _power_of_length(log_ratio, length, mask, 1.0)


def sqrt(log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None) -> Tensor:
    """l / sqrt(|z|): of order 1 when the per-token ratios are independent noise."""
    return _power_of_length(log_ratio, length, mask, 0.5)


@dataclass(frozen=True)
class Clip:
    """l clipped to [low, high] nats. The default is min(1, pi/r), from below open: a trace that the proposal
    liked less than pi gains nothing, one that only the proposal likes still loses its weight. Truncated IS,
    Ionides 2008."""

    low: float = -math.inf
    high: float = 0.0

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(f"clip needs low <= high, got low={self.low}, high={self.high} (nats)")

    def __call__(
        self, log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        ratio, _ = as_groups(log_ratio, mask, "log_ratio")
        return ratio.clamp(self.low, self.high).masked_fill(ratio.isneginf(), NEG_INF)


def psis(log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None) -> Tensor:
    """The tail of the ratios Pareto-smoothed (psis.py). Needs K >= 25, else UserError: with fewer draws there
    is no tail to fit. A group of which fewer were drawn (masked) keeps its raw ratios."""
    if log_ratio.ndim == 2 and log_ratio.shape[1] < MIN_DRAWS:
        raise UserError(
            f"ratio 'psis' needs at least {MIN_DRAWS} traces a group, got K={log_ratio.shape[1]}; "
            "draw more, or use 'ess_floor' or 'clip'"
        )
    return psis_smooth(log_ratio, mask)


@dataclass(frozen=True)
class EssFloor:
    """alpha l with the largest alpha in [0, 1] that keeps ESS(e (pi/r)^alpha) >= floor * n, found by
    bisection.

    n counts the draws with positive weight, so wrong traces (e = 0), which no alpha can help, do not drive
    alpha to 0. scope "group": an alpha for each group. "batch": one alpha for all, holding the mean of ESS /
    n over the groups that have weight; groups then remain comparable. Where even alpha = 0 is below the floor
    (the evidence alone is that uneven), alpha is 0. The ESS need not fall steadily with alpha when the
    evidence opposes the ratio; the alpha returned satisfies the floor in any case.
    """

    floor: float = 0.5
    scope: Literal["group", "batch"] = "group"
    steps: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise UserError(f"ess_floor needs 0 < floor <= 1 (a fraction of the draws), got {self.floor}")
        if self.scope not in ("group", "batch"):
            raise UserError(f"scope of ess_floor must be 'group' or 'batch', got {self.scope!r}")

    def alpha(self, log_ratio: Tensor, log_evidence: Tensor, mask: Tensor | None = None) -> Tensor:
        """The exponents, `[groups]`; 1 where a group has no weight to temper."""
        ratio, mask = as_groups(log_ratio.detach(), mask, "log_ratio")
        evidence, _ = as_groups(log_evidence.detach(), mask, "log_evidence")
        alive = ~(ratio.isneginf() | evidence.isneginf())

        def enough(alpha: Tensor) -> Tensor:
            logw = (evidence + alpha.unsqueeze(1) * ratio.masked_fill(~alive, 0.0)).masked_fill(
                ~alive, NEG_INF
            )
            fraction = effective_sample_size(logw, mask) / drawn(alive).to(logw.dtype)
            if self.scope == "batch":
                live = alive.any(1)
                mean = (fraction * live).sum() / live.sum().clamp(min=1)
                fraction = mean.expand_as(fraction)
            # n equal weights have ESS n only up to rounding.
            return fraction >= self.floor - 1e-6

        low = ratio.new_zeros(ratio.shape[0])
        high = torch.ones_like(low)
        full = enough(high)
        possible = enough(low)
        for _ in range(self.steps):
            middle = (low + high) / 2
            ok = enough(middle)
            low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
        tempered = torch.where(possible, low, torch.zeros_like(low))
        return torch.where(full | ~alive.any(1), torch.ones_like(low), tempered)

    def __call__(
        self, log_ratio: Tensor, log_evidence: Tensor, length: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        ratio, mask = as_groups(log_ratio, mask, "log_ratio")
        alpha = self.alpha(log_ratio, log_evidence, mask).unsqueeze(1)
        impossible = ratio.isneginf()
        return (alpha * ratio.masked_fill(impossible, 0.0)).masked_fill(impossible, NEG_INF)


RATIOS: Mapping[str, Ratio] = MappingProxyType(
    {
        "none": none,
        "per_token": per_token,
        "sqrt": sqrt,
        "clip": Clip(),
        "psis": psis,
        "ess_floor": EssFloor(),
        "zero": zero,
    }
)
"""By name, with default settings; for others build `Clip(low, high)` or `EssFloor(floor, scope)`."""


def ratio_named(name: str) -> Ratio:
    """The stabiliser called `name`. UserError with the nearest name if there is none."""
    if name not in RATIOS:
        raise UserError(f"unknown ratio {name!r}{nearest(name, RATIOS)}")
    return RATIOS[name]


def _power_of_length(log_ratio: Tensor, length: Tensor, mask: Tensor | None, power: float) -> Tensor:
    ratio, _ = as_groups(log_ratio, mask, "log_ratio")
    if length.shape != ratio.shape:
        raise UserError(
            f"length must have the shape of log_ratio {list(ratio.shape)}, got {list(length.shape)}"
        )
    # An empty trace has ratio 1, whatever it is divided by.
    return ratio / length.clamp(min=1).to(ratio.dtype).pow(power)
