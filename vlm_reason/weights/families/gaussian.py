"""What Gaussians with correlated weights share: blocks of coordinates, independent of one another.

    q = prod_b N(x_b; m_b, P_b^-1)

A block knows its precision P; a family says what a block's coordinates are in terms of the adapter's tensors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import same_keys, whole
from ..artefact import Tree, check_finite
from ..noise import POSTERIOR, Draw, normals, signed_draws
from ..posterior import Origin, Posterior
from .diagonal import DiagonalGaussian


class Precision(Protocol):
    """P of a block whose coordinates x are a tensor of `shape`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def root(self, z: Tensor) -> Tensor:
        """x [*shape] with covariance P^-1 of white z [*shape], fp32."""

    def square(self, x: Tensor) -> float:
        """x^T P x"""

    def log_det(self) -> float:
        """log |P|"""

    def variance(self) -> Tensor:
        """diag(P^-1) [*shape], fp64."""

    def covariance(self, j: Tensor) -> Tensor:
        """J P^-1 J^T [B, C, C] of j [B, C, *shape], fp64."""

    def trace_under(self, other: Any) -> float:
        """tr(P_other P^-1); `other` of the same type and shape."""

    def colder(self, tau: float) -> Self:
        """tau P"""


class BlockGaussian(Posterior):
    """blocks: name -> precision. Tensors of the adapter without a block are certain."""

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        blocks: Mapping[str, Precision],
        origin: Origin,
    ) -> None:
        super().__init__(adapter_config, origin)
        self._mean = {k: whole(v) for k, v in mean.items()}
        self._blocks: Mapping[str, Precision] = {k: blocks[k] for k in sorted(blocks)}
        check_finite(self._mean, "of the mean")

    # ------------------------------------------------------------------------------------------ what a family gives

    @abstractmethod
    def _moved(self, tree: Tree, name: str, x: Tensor) -> None:
        """Move `tree`, a copy of the mean, by x in the coordinates of block `name`."""

    @abstractmethod
    def _coordinates(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Block -> x fp64, how far `tree` is from the mean; None where no x gives `tree`."""

    @abstractmethod
    def _pulled(self, jacobian: Mapping[str, Tensor], name: str) -> Tensor:
        """Jacobian [B, C, *shape] with respect to the coordinates of block `name`."""

    @abstractmethod
    def _prior_of(self, name: str) -> tuple[Tensor, Tensor]:
        """(distance of the mean from the prior's mean, prior precision), both [*shape] of block `name`, fp64."""

    # ------------------------------------------------------------------------------------------------ the interface

    def mean(self) -> Tree:
        return {k: v.clone() for k, v in self._mean.items()}

    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        return (self._draw(seed, number, sign) for number, sign in signed_draws(n, antithetic))

    def _draw(self, seed: int, number: int, sign: float) -> Tree:
        tree = self.mean()
        shapes = [p.shape for p in self._blocks.values()]
        white = normals(shapes, Draw(seed, POSTERIOR, 0, number), torch.device("cpu"))
        for (name, precision), z in zip(self._blocks.items(), white, strict=True):
            self._moved(tree, name, precision.root(z) * sign)
        return tree

    def log_prob(self, tree: Mapping[str, Tensor]) -> float:
        """In nats, in the family's coordinates; -inf off its support. UserError for other keys or shapes."""
        same_keys(self._mean, tree, "the tree is not of this posterior")
        for key, mean in self._mean.items():
            if tree[key].shape != mean.shape:
                raise UserError(f"{key!r} has shape {tuple(tree[key].shape)}, not {tuple(mean.shape)}")
        apart = self._coordinates(tree)
        if apart is None:
            return -math.inf
        total = 0.0
        for name, precision in self._blocks.items():
            size = math.prod(precision.shape)
            total -= precision.square(apart[name]) / 2 + size * math.log(2 * math.pi) / 2
            total += precision.log_det() / 2
        return total

    def kl(self, other: Posterior | None = None) -> float:
        """KL(self || other) in nats: to the prior (None), to a posterior of this family, or to a diagonal one over the
        same tensors. Infinite where one is certain and the other is not. UserError for any other, and a flat prior."""
        if other is None:
            return sum(kl_to_diagonal(p, *self._prior_checked(name)) for name, p in self._blocks.items())
        if isinstance(other, DiagonalGaussian):
            return self._kl_diagonal(other)
        if type(other) is not type(self):
            raise UserError(f"no KL divergence in closed form from {self.family!r} to {other.family!r}")
        same_keys(self._mean, other._mean, "the posteriors are not over the same adapter")
        apart = other._coordinates(self._mean)
        if apart is None or self._blocks.keys() != other._blocks.keys():
            return math.inf
        total = 0.0
        for name, precision in self._blocks.items():
            theirs = other._blocks[name]
            total += precision.trace_under(theirs) + theirs.square(apart[name]) - math.prod(precision.shape)
            total += precision.log_det() - theirs.log_det()
        return total / 2

    def _kl_diagonal(self, other: DiagonalGaussian) -> float:
        raise UserError(f"no KL divergence in closed form from {self.family!r} to {other.family!r}")

    def _prior_checked(self, name: str) -> tuple[Tensor, Tensor]:
        apart, precision = self._prior_of(name)
        if not bool((precision > 0).all()):
            raise UserError(f"the prior of {name!r} is flat: no KL divergence to it; give another posterior")
        return apart, precision

    def output_covariance(self, jacobian: Mapping[str, Tensor]) -> Tensor:
        if not self._blocks:
            raise UserError("a posterior that is certain of all weights has no covariance")
        parts = [p.covariance(self._pulled(jacobian, name)) for name, p in self._blocks.items()]
        return torch.stack(parts).sum(0)

    def log_det(self) -> float:
        """log |P| over all coordinates."""
        return sum(p.log_det() for p in self._blocks.values())

    def temper(self, tau: float) -> Self:
        if not 0 < tau < math.inf:
            raise UserError(f"temper: tau must be > 0, got {tau}")
        origin = replace(self.origin, temper=self.origin.temper * tau)
        blocks = {name: p.colder(tau) for name, p in self._blocks.items()}
        return type(self)(self.adapter_config, self._mean, blocks, origin)


@dataclass(frozen=True)
class Dense:
    """P = L L^T over n coordinates, L lower triangular [n, n]."""

    factor: Tensor

    def __post_init__(self) -> None:
        """In the layout a file brings back: other strides round differently."""
        object.__setattr__(self, "factor", self.factor.contiguous())

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.factor),)

    @staticmethod
    def of(precision: Tensor) -> Dense:
        """UserError where `precision` is not positive definite."""
        factor, failed = torch.linalg.cholesky_ex(precision)
        if int(failed):
            raise UserError("a precision matrix is not positive definite: raise the prior precision")
        return Dense(factor)

    def root(self, z: Tensor) -> Tensor:
        return self._solve(z.to(self.factor)[:, None], transpose=True).squeeze(-1).float()

    def square(self, x: Tensor) -> float:
        return float((x.double() @ self.factor.double()).square().sum())

    def log_det(self) -> float:
        return 2 * float(self.factor.diagonal().double().log().sum())

    def variance(self) -> Tensor:
        eye = torch.eye(len(self.factor), dtype=torch.float64)
        return torch.linalg.solve_triangular(self.factor.double(), eye, upper=False).square().sum(0)

    def covariance(self, j: Tensor) -> Tensor:
        half = self._solve(j.double().flatten(0, 1).mT.cpu(), transpose=False).mT.view(*j.shape)
        return half @ half.mT

    def trace_under(self, other: Dense) -> float:
        return float(self._solve(other.factor.double(), transpose=False).square().sum())

    def colder(self, tau: float) -> Dense:
        return Dense(self.factor * math.sqrt(tau))

    def _solve(self, right: Tensor, transpose: bool) -> Tensor:
        factor = self.factor.to(right.dtype)
        return torch.linalg.solve_triangular(factor.mT if transpose else factor, right, upper=transpose)


def kl_to_diagonal(precision: Precision, apart: Tensor, theirs: Tensor) -> float:
    """To N(0, diag 1/theirs), the mean `apart` from 0."""
    spread = float((theirs * (precision.variance() + apart.square())).sum())
    return (spread - theirs.numel() - float(theirs.log().sum()) + precision.log_det()) / 2
