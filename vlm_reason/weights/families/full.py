"""A Gaussian with one covariance over all uncertain weights of a small adapter.

    q = N(m, P^-1),    P = L L^T [n, n]

n weights take n^2 numbers: 64 MB in fp32 at n = 4,000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import same_keys, whole
from ..artefact import Tree
from ..posterior import Origin
from .diagonal import DiagonalGaussian
from .gaussian import BlockGaussian, Dense, kl_to_diagonal

FACTOR, PLACE = "precision.factor", ".place"
_ALL = "all"


class FullGaussian(BlockGaussian):
    """keys: the uncertain tensors, one behind the other in the coordinates; factor: L.

    When not to use it: above a few thousand weights; see `kronecker` and `core`.
    """

    family: ClassVar[str] = "full"
    _blocks: Mapping[str, Dense]

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        blocks: Mapping[str, Dense],
        origin: Origin,
        keys: Sequence[str] = (),
    ) -> None:
        super().__init__(adapter_config, mean, blocks, origin)
        self._keys = list(keys)
        wrong = [k for k in self._keys if k not in self._mean]
        if wrong:
            raise UserError(f"the covariance is over {wrong[0]!r}: the adapter has no such tensor")
        size = sum(self._mean[k].numel() for k in self._keys)
        if self._blocks[_ALL].shape != (size,):
            raise UserError(
                f"the covariance is over {self._blocks[_ALL].shape[0]} weights, the tensors have {size}"
            )

    @classmethod
    def of(
        cls,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        keys: Sequence[str],
        block: Dense,
        origin: Origin,
    ) -> FullGaussian:
        return cls(adapter_config, mean, {_ALL: block}, origin, keys)

    def _moved(self, tree: Tree, name: str, x: Tensor) -> None:
        for key, part in self._split(x).items():
            tree[key] += part

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        parts = x.split([self._mean[k].numel() for k in self._keys])
        return {k: part.view_as(self._mean[k]) for k, part in zip(self._keys, parts, strict=True)}

    def _coordinates(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        apart = {k: whole(tree[k]).double() - v.double() for k, v in self._mean.items()}
        if any(bool((apart[k] != 0).any()) for k in apart if k not in set(self._keys)):
            return None
        return {_ALL: torch.cat([apart[k].flatten() for k in self._keys])}

    def _pulled(self, jacobian: Mapping[str, Tensor], name: str) -> Tensor:
        return torch.cat([jacobian[k].flatten(2) for k in self._keys], -1)

    def _prior_of(self, name: str) -> tuple[Tensor, Tensor]:
        mean = torch.cat([self._mean[k].flatten().double() for k in self._keys])
        each = [torch.full((self._mean[k].numel(),), self.origin.prior.get(k, 0.0)) for k in self._keys]
        return mean, torch.cat(each).double()

    def _kl_diagonal(self, other: DiagonalGaussian) -> float:
        mean, sigma = other.mean(), other.sigma()
        same_keys(self._mean, mean, "the posteriors are not over the same adapter")
        certain = [k for k in mean if k not in sigma]
        if sigma.keys() != set(self._keys) or any(bool((v == 0).any()) for v in sigma.values()):
            return math.inf
        if any(not torch.equal(mean[k], self._mean[k]) for k in certain):
            return math.inf
        apart = torch.cat([(self._mean[k].double() - mean[k]).flatten() for k in self._keys])
        precision = torch.cat([sigma[k].double().square().reciprocal().flatten() for k in self._keys])
        return kl_to_diagonal(self._blocks[_ALL], apart, precision)

    def temper(self, tau: float) -> FullGaussian:
        if not 0 < tau < math.inf:
            raise UserError(f"temper: tau must be > 0, got {tau}")
        origin = replace(self.origin, temper=self.origin.temper * tau)
        return self.of(self.adapter_config, self._mean, self._keys, self._blocks[_ALL].colder(tau), origin)

    def uncertain(self) -> list[str]:
        return list(self._keys)

    def precision_diag(self) -> Tree:
        found = {k: torch.full_like(v, math.inf) for k, v in self._mean.items()}
        for key, part in self._split(self._blocks[_ALL].variance().reciprocal()).items():
            found[key] = part.float()
        return found

    def tensors(self) -> Tree:
        """precision.factor, and <key>.place: the number of the key among the coordinates' tensors."""
        places = {k + PLACE: torch.tensor(float(n)) for n, k in enumerate(self._keys)}
        return {FACTOR: self._blocks[_ALL].factor.float(), **places}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> FullGaussian:
        places = {name.removesuffix(PLACE): int(v) for name, v in tensors.items() if name.endswith(PLACE)}
        if FACTOR not in tensors or len(tensors) != len(places) + 1:
            raise UserError(f"a full posterior has tensors {FACTOR} and <key>{PLACE} only")
        keys = sorted(places, key=lambda k: places[k])
        return cls.of(adapter_config, mean, keys, Dense(tensors[FACTOR]), origin)
