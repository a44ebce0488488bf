"""A Gaussian over an r x r core of every LoRA layer, with all its correlations.

    Delta W = s B R A,    vec(R) ~ N(vec(1), P^-1),    P [r^2, r^2] a layer

(the parametrisation of LoRA-XS, Balazy et al. 2024, arXiv 2405.17604, at R = 1). A draw is an ordinary adapter:
A <- R A. r^4 numbers a layer, whatever its width. The prior, N(0, 1 / delta) on R, has its mean at no update at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import whole
from ..artefact import Tree
from ..per_row import A
from ..posterior import Origin
from .gaussian import BlockGaussian, Dense

FACTOR = ".core_factor"
_ON_SUPPORT = 1e-5  # of |A|: what rounding of R A leaves outside the rows of A


class CoreGaussian(BlockGaussian):
    """blocks: key of A -> precision over vec(R), row by row. Densities and KL divergences are those of R.

    When not to use it: where the directions in which A and B may turn outside their own spans matter, as after very
    little training.
    """

    family: ClassVar[str] = "core"
    _blocks: Mapping[str, Dense]

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        blocks: Mapping[str, Dense],
        origin: Origin,
    ) -> None:
        super().__init__(adapter_config, mean, blocks, origin)
        for key, block in self._blocks.items():
            if key not in self._mean or not key.endswith(A):
                raise UserError(f"a core of {key!r}: the adapter has no such {A[1:]}")
            rank = len(self._mean[key])
            if block.shape != (rank * rank,):
                raise UserError(
                    f"the core of {key!r} has {block.shape[0]} coordinates, rank {rank} makes {rank * rank}"
                )

    def _moved(self, tree: Tree, name: str, x: Tensor) -> None:
        mean = self._mean[name]
        tree[name] += x.view(len(mean), -1) @ mean

    def _coordinates(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        found = {}
        for key, mean in self._mean.items():
            apart = whole(tree[key]).double() - mean.double()
            if key not in self._blocks:
                if bool((apart != 0).any()):
                    return None
                continue
            moved = torch.linalg.lstsq(mean.double().mT, apart.mT).solution.mT
            if float((apart - moved @ mean.double()).norm()) > _ON_SUPPORT * float(mean.norm()):
                return None
            found[key] = moved.flatten()
        return found

    def _pulled(self, jacobian: Mapping[str, Tensor], name: str) -> Tensor:
        return (jacobian[name].double().cpu() @ self._mean[name].double().mT).flatten(2)

    def _prior_of(self, name: str) -> tuple[Tensor, Tensor]:
        one = torch.eye(len(self._mean[name]), dtype=torch.float64).flatten()
        return one, torch.full_like(one, self.origin.prior.get(name, 0.0))

    def uncertain(self) -> list[str]:
        return list(self._blocks)

    def precision_diag(self) -> Tree:
        """Of the weights of A, each by itself."""
        found = {k: torch.full_like(v, math.inf) for k, v in self._mean.items()}
        for key, block in self._blocks.items():
            a, rank = self._mean[key].double(), len(self._mean[key])
            eye = torch.eye(rank * rank, dtype=torch.float64)
            covariance = torch.cholesky_solve(eye, block.factor.double()).view(rank, rank, rank, rank)
            variance = torch.stack([((covariance[i, :, i] @ a) * a).sum(0) for i in range(rank)])
            found[key] = variance.reciprocal().float()
        return found

    def tensors(self) -> Tree:
        return {key + FACTOR: block.factor.float() for key, block in self._blocks.items()}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> CoreGaussian:
        wrong = [name for name in tensors if not name.endswith(FACTOR)]
        if wrong:
            raise UserError(f"a core posterior has tensors named <key>{FACTOR} only, found {wrong[0]!r}")
        blocks = {name.removesuffix(FACTOR): Dense(v) for name, v in tensors.items()}
        return cls(adapter_config, mean, blocks, origin)
