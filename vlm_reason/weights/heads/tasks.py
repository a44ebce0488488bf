"""What a last layer is for: how its outputs meet the targets. A task gives E_q log p(y | f) and the curvature that a
closed-form start needs; the mathematics is in regression.py, classification.py and reward.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ...errors import UserError, nearest
from .classification import BOUNDS, Normals, expected_log_softmax, jensen_bound
from .gaussian import Head
from .regression import expected_log_normal
from .reward import expected_log_sigmoid


class Task(Protocol):
    kind: ClassVar[str]

    @property
    def outputs(self) -> int: ...

    def expected_log_prob(
        self, head: Head, mean: Tensor, variance: Tensor, target: Tensor, normals: Normals
    ) -> Tensor:
        """E log p(y | f) or a bound on it, [B], f_c ~ N(mean_c, variance_c), [B, C] each."""

    def curvature(self, f: Tensor) -> Tensor:
        """-d^2 log p(y | f) / df_c^2 expected over y, [N, C] at f [N, C]."""


@dataclass(frozen=True)
class RegressionTask:
    """target [B, C]. noise [C] variances are the head's own."""

    outputs: int = 1
    kind: ClassVar[str] = "regression"

    def expected_log_prob(
        self, head: Head, mean: Tensor, variance: Tensor, target: Tensor, normals: Normals
    ) -> Tensor:
        assert head.log_noise is not None, "a regression head has a noise"
        return expected_log_normal(mean, variance, target, head.log_noise.exp())

    def curvature(self, f: Tensor) -> Tensor:
        return torch.ones_like(f)


@dataclass(frozen=True)
class ClassificationTask:
    """target [B], the index of the right class. bound: jensen | monte_carlo (quadrature for two classes)."""

    outputs: int
    bound: str = "monte_carlo"
    draws: int = 8
    kind: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            raise UserError(
                f"bound must be one of {', '.join(BOUNDS)}, got {self.bound!r}{nearest(self.bound, BOUNDS)}"
            )
        if self.draws < 2 or self.draws % 2:
            raise UserError(f"bound_draws must be even and >= 2, got {self.draws}")

    def expected_log_prob(
        self, head: Head, mean: Tensor, variance: Tensor, target: Tensor, normals: Normals
    ) -> Tensor:
        if self.bound == "jensen":
            return jensen_bound(mean, variance, target)
        return expected_log_softmax(mean, variance, target, self.draws, normals)

    def curvature(self, f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p * (1 - p)


@dataclass(frozen=True)
class RewardTask:
    """Features are differences, preferred - rejected; no target."""

    outputs: int = 1
    kind: ClassVar[str] = "reward"

    def expected_log_prob(
        self, head: Head, mean: Tensor, variance: Tensor, target: Tensor, normals: Normals
    ) -> Tensor:
        return expected_log_sigmoid(mean, variance)[:, 0]

    def curvature(self, f: Tensor) -> Tensor:
        p = f.sigmoid()
        return p * (1 - p)
