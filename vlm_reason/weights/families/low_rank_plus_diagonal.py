"""A Gaussian with a diagonal plus a few directions: q = N(m, diag sigma^2 + U U^T), U of K columns.

    draw         m + sigma z1 + U z2,      z1, z2 standard normal
    density      by Woodbury, with S = diag sigma^2, M = I + U^T S^-1 U [K, K], d = theta - m, b = U^T S^-1 d:
                 -2 log q = d^T S^-1 d - b^T M^-1 b + log|S| + log|M| + P log 2 pi

What SWAG gives. K is tens, so all that is quadratic is K by K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import same_keys, whole
from ..artefact import Tree, check_finite
from ..noise import POSTERIOR, Draw, signed_draws
from ..posterior import Origin, Posterior
from .diagonal import SCALE, DiagonalGaussian

FACTOR = ".lowrank"


class LowRankPlusDiagonal(Posterior):
    """mean: every tensor of the adapter. sigma: of the uncertain ones, >= 0. factor: of the same keys, [K, *shape], one
    K for all; row k of all of them together is column k of U.

    When not to use it: with K above a few hundred; with sigma 0 where U is not, it has draws but no density.
    """

    family: ClassVar[str] = "low_rank_plus_diagonal"

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        sigma: Mapping[str, Tensor],
        factor: Mapping[str, Tensor],
        origin: Origin,
    ) -> None:
        super().__init__(adapter_config, origin)
        self._diagonal = DiagonalGaussian(adapter_config, mean, sigma, origin)
        same_keys(sigma, factor, "sigma and the low-rank factor are not of the same tensors")
        self._factor = {k: whole(factor[k]) for k in self._diagonal.uncertain()}
        check_finite(self._factor, "of the low-rank factor")
        self.rank = next((len(u) for u in self._factor.values()), 0)
        for key, u in self._factor.items():
            if u.shape != (self.rank, *mean[key].shape):
                raise UserError(
                    f"the low-rank factor of {key!r} has shape {tuple(u.shape)}, "
                    f"not {(self.rank, *mean[key].shape)}: [K, *shape], one K for all tensors"
                )

    def mean(self) -> Tree:
        return self._diagonal.mean()

    def sigma(self) -> Tree:
        """Of the diagonal part alone."""
        return self._diagonal.sigma()

    def factor(self) -> Tree:
        """U: key -> [K, *shape]."""
        return {k: v.clone() for k, v in self._factor.items()}

    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        signed = signed_draws(n, antithetic)
        diagonal = self._diagonal.sample(n, seed, antithetic)
        return (self._shifted(tree, seed, *draw) for tree, draw in zip(diagonal, signed, strict=True))

    def _shifted(self, tree: Tree, seed: int, number: int, sign: float) -> Tree:
        """tree + U z2."""
        z = sign * Draw(seed, POSTERIOR, 1, number).normal(0, self.rank, torch.device("cpu"))
        for key, u in self._factor.items():
            tree[key] += torch.tensordot(z, u, 1)
        return tree

    def log_prob(self, tree: Mapping[str, Tensor]) -> float:
        """In nats, over the uncertain weights; -inf where a certain one differs. A weight is certain where its sigma
        and its row of U are 0. UserError for other keys or shapes, and where sigma is 0 and U is not."""
        same_keys(self._diagonal._mean, tree, "the tree is not of this posterior")
        quadratic = size = 0.0
        b = torch.zeros(self.rank, dtype=torch.float64)
        for key, mean in self._diagonal._mean.items():
            if tree[key].shape != mean.shape:
                raise UserError(f"{key!r} has shape {tuple(tree[key].shape)}, not {tuple(mean.shape)}")
            apart = (whole(tree[key]).double() - mean).flatten()
            if key not in self._factor:
                if bool((apart != 0).any()):
                    return -math.inf
                continue
            sigma, u, free = self._free(key)
            if bool((apart[~free] != 0).any()):
                return -math.inf
            scaled = apart[free] / sigma
            quadratic += float(scaled.square().sum())
            b += (u / sigma) @ scaled
            size += len(sigma)
        log_determinant, small = self._determinant()
        quadratic -= float(b @ torch.cholesky_solve(b[:, None], small)[:, 0])
        return -0.5 * (quadratic + log_determinant + size * math.log(2 * math.pi))

    def kl(self, other: Posterior | None = None) -> float:
        """KL(self || other) in nats, other a diagonal Gaussian over the same tensors; None is the prior, and then only
        the uncertain tensors count. UserError for a flat prior and other families; infinite where `other` is certain of
        a weight that this posterior is not, or the other way round."""
        if other is None:
            other, keys = self._diagonal._prior(), list(self._factor)
        elif isinstance(other, DiagonalGaussian):
            same_keys(self._diagonal._mean, other._mean, "the posteriors are not over the same adapter")
            keys = list(self._diagonal._mean)
        else:
            raise UserError(f"no KL divergence in closed form from {self.family!r} to {other.family!r}")
        total = 0.0
        for key in keys:
            apart = (self._diagonal._mean[key].double() - other._mean[key]).flatten()
            variance, s2 = self._variance(key).flatten(), other._sigma_or_zero(key).square().flatten()
            certain = (variance == 0) & (s2 == 0)
            if bool(((variance == 0) != (s2 == 0)).any()) or bool((apart[certain] != 0).any()):
                return math.inf
            s2 = s2[~certain]
            total += float(((variance[~certain] + apart[~certain].square()) / s2 - 1 + s2.log()).sum())
        return 0.5 * (total - self._determinant()[0])

    def precision_diag(self) -> Tree:
        """1 / (sigma^2 + sum_k U_k^2), the marginals'."""
        return {key: self._variance(key).reciprocal().float() for key in self._diagonal._mean}

    def uncertain(self) -> list[str]:
        return list(self._factor)

    def output_covariance(self, jacobian: Mapping[str, Tensor]) -> Tensor:
        diagonal = self._diagonal.output_covariance(jacobian)
        along: Tensor = torch.zeros((), dtype=torch.float64)
        for key, u in self._factor.items():
            along = along + jacobian[key].flatten(2).double() @ u.flatten(1).double().T.to(
                jacobian[key].device
            )
        return diagonal + along @ along.mT

    def temper(self, tau: float) -> LowRankPlusDiagonal:
        if not 0 < tau < math.inf:
            raise UserError(f"temper: tau must be > 0, got {tau}")
        sigma = {k: v / math.sqrt(tau) for k, v in self.sigma().items()}
        factor = {k: v / math.sqrt(tau) for k, v in self._factor.items()}
        origin = replace(self.origin, temper=self.origin.temper * tau)
        return LowRankPlusDiagonal(self.adapter_config, self.mean(), sigma, factor, origin)

    def tensors(self) -> Tree:
        return {**self._diagonal.tensors(), **{key + FACTOR: value for key, value in self._factor.items()}}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> LowRankPlusDiagonal:
        wrong = [key for key in tensors if not key.endswith((SCALE, FACTOR))]
        if wrong:
            raise UserError(
                f"this posterior has tensors named <key>{SCALE} and <key>{FACTOR}, found {wrong[0]!r}"
            )
        sigma = {key.removesuffix(SCALE): value for key, value in tensors.items() if key.endswith(SCALE)}
        factor = {key.removesuffix(FACTOR): value for key, value in tensors.items() if key.endswith(FACTOR)}
        return cls(adapter_config, mean, sigma, factor, origin)

    # ------------------------------------------------------------------------------------------------------- inside

    def _variance(self, key: str) -> Tensor:
        """Of the marginals, fp64, the tensor's shape."""
        sigma = self._diagonal._sigma_or_zero(key)
        if key not in self._factor:
            return sigma.square()
        return sigma.square() + self._factor[key].double().square().sum(0)

    def _free(self, key: str) -> tuple[Tensor, Tensor, Tensor]:
        """(sigma [F], U [K, F] of the F uncertain weights of a tensor, which they are [all of them])."""
        sigma, u = self._diagonal._sigma[key].double().flatten(), self._factor[key].double().flatten(1)
        free = sigma > 0
        if bool((u[:, ~free] != 0).any()):
            raise UserError(
                f"no density: weights of {key!r} have sigma 0 and vary along the low-rank directions"
            )
        return sigma[free], u[:, free], free

    def _determinant(self) -> tuple[float, Tensor]:
        """(log|Sigma| over the uncertain weights, the Cholesky factor of M)."""
        total, m = 0.0, torch.eye(self.rank, dtype=torch.float64)
        for key in self._factor:
            sigma, u, _ = self._free(key)
            total += float(sigma.log().sum()) * 2
            m += (u / sigma) @ (u / sigma).T
        small = torch.linalg.cholesky(m)
        return total + 2 * float(small.diagonal().log().sum()), small
