"""From the weights of a group to the coefficients in front of grad log pi(z_k|x).

Every normaliser is called with log weights, `normaliser(logw, mask) -> [groups, K]`, and says in `acts_on`
whether its formula is applied to w = exp(log w) or to log w itself: for a 0/1 reward log w is 0 or -inf and
the formula acts on w; for a log-probability reward (LaTRO) it acts on log w.

`per_draw` True: the results are advantages of order 1 a draw, and the gradient estimate is their mean over
the group. False: they are already the terms of a sum. `coefficients()` settles it: what it returns is summed
over the group.

Null groups (no draw with weight) get zeros, and so does whatever is masked. Where acts_on is "log w", a drawn
-inf has no finite reward: it gets coefficient 0 and enters nobody's baseline, unless `floor` gives it (and
all below) a value.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .groups import NEG_INF, as_groups, drawn
from .independence_mh import metropolis
from .leave_one_out import leave_one_out_mean, vimco_signal
from .weights import self_normalised

ActsOn = Literal["w", "log w"]


class Normaliser(ABC):
    """Base of all: `formula` works on checked fp32 log weights. Frozen dataclasses, equal when their settings
    are."""

    name: ClassVar[str]
    per_draw: ClassVar[bool] = False
    needs_uniforms: ClassVar[bool] = False

    acts_on: ActsOn

    def __call__(self, logw: Tensor, mask: Tensor | None = None, uniforms: Tensor | None = None) -> Tensor:
        """The normaliser's own values, `[groups, K]`, detached. `uniforms [groups, K]` in [0, 1): only
        `metropolis`."""
        if self.acts_on not in ("w", "log w"):
            raise UserError(f"acts_on must be 'w' or 'log w', got {self.acts_on!r}")
        if self.needs_uniforms and uniforms is None:
            raise UserError(f"normaliser {self.name!r} needs uniforms [groups, K], one for each draw")
        logw, mask = as_groups(logw.detach(), mask)
        return self.formula(logw, mask, uniforms).masked_fill(~mask, 0.0)

    def coefficients(
        self, logw: Tensor, mask: Tensor | None = None, uniforms: Tensor | None = None
    ) -> Tensor:
        """Ready for a loss that sums over the group: divided by the number of drawn traces if `per_draw`."""
        values = self(logw, mask, uniforms)
        if not self.per_draw:
            return values
        count = (
            torch.full_like(values[:, 0], values.shape[1]) if mask is None else drawn(mask).to(values.dtype)
        )
        return values / count.unsqueeze(1)

    @abstractmethod
    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class SelfNormalised(Normaliser):
    """w_k / sum_j w_j. On 0/1 rewards with r = pi the expected update is (1 - (1-P)^K) grad log P."""

    name: ClassVar[str] = "self"
    acts_on: ActsOn = "log w"

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        return self_normalised(logw, mask)


@dataclass(frozen=True)
class LooMean(Normaliser):
    """v_k - mean_{j != k} v_j, v = w or log w. RLOO: on 0/1 rewards the update is grad P, unbiased. A group
    with one draw has baseline 0."""

    name: ClassVar[str] = "loo_mean"
    per_draw: ClassVar[bool] = True
    acts_on: ActsOn = "w"
    floor: float | None = None

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        values, known = _rewards(logw, mask, self.acts_on, self.floor)
        # Equal rewards must give exactly 0: Adam would blow a rounding error up to a full step.
        flat = (_all_equal(values, known) & (known.sum(1) > 1)).unsqueeze(1)
        return (values - leave_one_out_mean(values, known)).masked_fill(~known | flat, 0.0)


@dataclass(frozen=True)
class LooLogMeanExp(Normaliser):
    """log mean_j w_j - log mean_{j != k} w_j: the score term of the K-draw bound with r = pi (JEPO). Where
    the others have no weight the baseline is 0 (`vimco_signal`), so a lone right trace is pushed by log mean
    w itself: use it with evidence that is a probability, not 0/1."""

    name: ClassVar[str] = "loo_log_mean_exp"
    acts_on: ActsOn = "log w"

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        return vimco_signal(logw, mask)


@dataclass(frozen=True)
class MeanStd(Normaliser):
    """(v_k - mean v) / (std v + eps), v = w or log w; the advantage of GRPO (arXiv 2402.03300).

    On 0/1 rewards the update tends to grad P / sqrt(P (1-P)) = sqrt(P / (1-P)) grad log P as K grows. ddof 1
    and eps 1e-4 as in TRL. Groups with all values equal, or with one draw, get zeros.
    """

    name: ClassVar[str] = "mean_std"
    per_draw: ClassVar[bool] = True
    acts_on: ActsOn = "w"
    floor: float | None = None
    ddof: int = 1
    eps: float = 1e-4

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        values, known = _rewards(logw, mask, self.acts_on, self.floor)
        count = known.sum(1, keepdim=True).to(values.dtype)
        centred = (values - values.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill(~known, 0.0)
        variance = centred.square().sum(1, keepdim=True) / (count - self.ddof).clamp(min=1)
        flat = _all_equal(values, known).unsqueeze(1)
        return (centred / (variance.sqrt() + self.eps).masked_fill(flat, 1.0)).masked_fill(flat, 0.0)


@dataclass(frozen=True)
class DivideByMean(Normaliser):
    """w_k / mean_j w_j, or (w_k - mean) / mean with centre=True; MaxRL (arXiv 2602.02710).

    On 0/1 rewards with r = pi the expected update is c grad log P with c = 1 - (1-P)^K, centred 1 -
    (1-P)^(K-1).
    """

    name: ClassVar[str] = "divide_by_mean"
    per_draw: ClassVar[bool] = True
    acts_on: ActsOn = "w"
    centre: bool = False

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        if self.acts_on != "w":
            raise UserError("divide_by_mean acts on w: a mean of log weights is no scale to divide by")
        share = self_normalised(logw, mask) * drawn(mask).to(logw.dtype).unsqueeze(1)
        null = logw.isneginf().all(1, keepdim=True)
        return (share - 1).masked_fill(null, 0.0) if self.centre else share


@dataclass(frozen=True)
class Rank(Normaliser):
    """(rank of w_k) / n - (n + 1) / (2n): the smallest has rank 1, the largest n, ties share their mean rank;
    centred, so a group sums to 0. Draws of weight 0 tie for the lowest place. Only the order matters, so w
    and log w agree."""

    name: ClassVar[str] = "rank"
    per_draw: ClassVar[bool] = True
    acts_on: ActsOn = "log w"

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        mine, other = logw.unsqueeze(2), logw.unsqueeze(1)
        pair = mask.unsqueeze(1)
        below = ((other < mine) & pair).sum(2).to(logw.dtype)
        tied = ((other == mine) & pair).sum(2).to(logw.dtype)
        count = drawn(mask).to(logw.dtype).unsqueeze(1)
        rank = below + (tied + 1) / 2
        null = logw.isneginf().all(1, keepdim=True)
        return (rank / count - (count + 1) / (2 * count)).masked_fill(null, 0.0)


@dataclass(frozen=True)
class Metropolis(Normaliser):
    """Share of the time that an independence Metropolis chain over the group's draws spends at each: see
    independence_mh.py. Needs `uniforms`; without weight anywhere, zeros."""

    name: ClassVar[str] = "metropolis"
    needs_uniforms: ClassVar[bool] = True
    acts_on: ActsOn = "log w"

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        assert uniforms is not None  # checked by __call__
        return metropolis(logw, uniforms, mask).occupancy


@dataclass(frozen=True)
class Argmax(Normaliser):
    """1 for the draw with the largest weight, 0 for the rest; the first of equals. Best-of-K distillation:
    its fixed point is not the posterior."""

    name: ClassVar[str] = "argmax"
    acts_on: ActsOn = "log w"

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        best = logw == logw.amax(1, keepdim=True)
        first = best & (best.long().cumsum(1) == 1)
        return first.to(logw.dtype).masked_fill(logw.isneginf(), 0.0)


@dataclass(frozen=True)
class Identity(Normaliser):
    """w_k itself: REINFORCE without baseline, rejection-sampling fine-tuning on 0/1 rewards. Update: grad
    E_r[w]."""

    name: ClassVar[str] = "none"
    per_draw: ClassVar[bool] = True
    acts_on: ActsOn = "w"
    floor: float | None = None

    def formula(self, logw: Tensor, mask: Tensor, uniforms: Tensor | None) -> Tensor:
        return _rewards(logw, mask, self.acts_on, self.floor)[0]


NORMALISERS: Mapping[str, Normaliser] = MappingProxyType(
    {
        n.name: n
        for n in (
            SelfNormalised(),
            LooMean(),
            LooLogMeanExp(),
            MeanStd(),
            DivideByMean(),
            Rank(),
            Metropolis(),
            Argmax(),
            Identity(),
        )
    }
)
"""By name, with default settings; for others build the class."""


def normaliser_named(name: str) -> Normaliser:
    """The normaliser called `name`. UserError with the nearest name if there is none."""
    if name not in NORMALISERS:
        raise UserError(f"unknown normaliser {name!r}{nearest(name, NORMALISERS)}")
    return NORMALISERS[name]


def _rewards(logw: Tensor, mask: Tensor, acts_on: ActsOn, floor: float | None) -> tuple[Tensor, Tensor]:
    """The finite rewards v, 0 where unknown, and which draws have one."""
    if acts_on == "w":
        if floor is not None:
            raise UserError(f"floor={floor} is for acts_on='log w'; w = 0 is a finite reward already")
        if bool((logw > math.log(torch.finfo(logw.dtype).max)).any()):
            raise UserError(
                f"log w = {logw.max().item():.4g} overflows as a reward w; use acts_on='log w', or 'self', which stays "
                "in log space"
            )
        return logw.exp().masked_fill(~mask, 0.0), mask
    if floor is not None:
        if not math.isfinite(floor):
            raise UserError(f"floor must be finite (nats), got {floor}")
        return logw.clamp(min=floor).masked_fill(~mask, 0.0), mask
    known = mask & ~logw.isneginf()
    return logw.masked_fill(~known, 0.0), known


def _all_equal(values: Tensor, known: Tensor) -> Tensor:
    largest = values.masked_fill(~known, NEG_INF).amax(1)
    smallest = values.masked_fill(~known, math.inf).amin(1)
    return largest <= smallest
