"""A Gaussian with a Kronecker-factored precision, one LoRA matrix apart from another.

    P = delta 1 + S (x) Q,    S = V diag(s) V^T [r, r],    Q = U diag(q) U^T + rho (1 - U U^T) [d, d],    U [d, k]

over a matrix theta [r, d] (A as it is, B transposed). P is diagonal in V (x) [U, its complement], with eigenvalues
delta + s_i q_j, and delta + s_i rho d - k times for every i, so determinants, draws and J P^-1 J^T are exact from U
alone and nothing of size d x d is made; this is Woodbury's identity, with its inner matrix diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import same_keys, whole
from ..artefact import Tree
from ..per_row import B
from ..posterior import Origin
from .diagonal import DiagonalGaussian
from .gaussian import BlockGaussian, kl_to_diagonal

PARTS = ("small_vectors", "small_values", "large_vectors", "large_values", "rest", "delta")
SHARED = ".large_of"


@dataclass(frozen=True)
class Kronecker:
    """small_vectors V [r, r], small_values s [r], large_vectors U [d, k], large_values q [k], rest rho, delta: scalar
    tensors."""

    small_vectors: Tensor
    small_values: Tensor
    large_vectors: Tensor
    large_values: Tensor
    rest: Tensor
    delta: Tensor

    def __post_init__(self) -> None:
        """In the layout a file brings back: other strides round differently."""
        for part in PARTS:
            object.__setattr__(self, part, getattr(self, part).contiguous())

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.small_vectors), len(self.large_vectors)

    def spectrum(self) -> tuple[Tensor, Tensor, int]:
        """Eigenvalues of P, fp64: [r, k] within U; [r] outside, each that many times: d - k."""
        s, delta = self.small_values.double(), self.delta.double()
        inside = delta + s[:, None] * self.large_values.double()
        return inside, delta + s * self.rest.double(), self.shape[1] - len(self.large_values)

    def root(self, z: Tensor) -> Tensor:
        inside, outside, _ = self.spectrum()
        dtype = torch.promote_types(z.dtype, self.large_vectors.dtype)
        v, u = self.small_vectors.to(dtype), self.large_vectors.to(dtype)
        return (v @ self._scaled(v.mT @ z.to(dtype), u, inside.rsqrt(), outside.rsqrt())).float()

    def square(self, x: Tensor) -> float:
        inside, outside, _ = self.spectrum()
        v, u = self.small_vectors.double(), self.large_vectors.double()
        x = v.mT @ x.double()
        return float((x * self._scaled(x, u, inside, outside)).sum())

    def log_det(self) -> float:
        inside, outside, times = self.spectrum()
        return float(inside.log().sum()) + (times * float(outside.log().sum()) if times else 0.0)

    def variance(self) -> Tensor:
        inside, outside, times = self.spectrum()
        u2 = self.large_vectors.double().square()
        along = inside.reciprocal() @ u2.mT  # [r, d]
        if times:
            along = along + outside.reciprocal()[:, None] * (1 - u2.sum(1)).clamp_min(0)
        return self.small_vectors.double().square() @ along

    def covariance(self, j: Tensor) -> Tensor:
        inside, outside, times = self.spectrum()
        j = self.small_vectors.double().mT @ j.double().cpu()  # [B, C, r, d]
        ju = j @ self.large_vectors.double()
        found = (ju * inside.reciprocal()).flatten(2) @ ju.flatten(2).mT
        if times:
            weight = outside.reciprocal()[:, None]
            found = found + (j * weight).flatten(2) @ j.flatten(2).mT
            found = found - (ju * weight).flatten(2) @ ju.flatten(2).mT
        return found

    def trace_under(self, other: Kronecker) -> float:
        inside, outside, times = self.spectrum()
        v, u, w = self.small_vectors.double(), self.large_vectors.double(), other.large_vectors.double()
        size = self.shape[1]
        theirs = other.small_vectors.double()
        weights = ((theirs.mT @ v).square() * other.small_values.double()[:, None]).sum(0)  # v_i^T S' v_i
        rho = float(other.rest) if size > w.shape[1] else 0.0
        lead = other.large_values.double() - rho
        along = (u.mT @ w).square() @ lead + rho  # u_j^T Q' u_j
        left = float(lead.sum()) + rho * size - float(along.sum())
        total = float((weights[:, None] * along / inside).sum())
        plain = float(inside.reciprocal().sum())
        if times:
            total += left * float((weights / outside).sum())
            plain += times * float(outside.reciprocal().sum())
        return total + float(other.delta) * plain

    def colder(self, tau: float) -> Kronecker:
        return replace(self, small_values=self.small_values * tau, delta=self.delta * tau)

    def _scaled(self, x: Tensor, u: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        """diag(inside) within U, diag(outside) beyond it, on x [r, d] in the basis V."""
        xu = x @ u
        found = (xu * inside.to(x.dtype)) @ u.mT
        if u.shape[1] == self.shape[1]:
            return found
        return found + outside.to(x.dtype)[:, None] * (x - xu @ u.mT)


class KroneckerGaussian(BlockGaussian):
    """A block a tensor of the adapter, of its name.

    When not to use it: where a full covariance fits (`full`, `core`), or where correlations between layers, or between
    the two factors of one layer, carry the uncertainty: they are left out.
    """

    family: ClassVar[str] = "kronecker"
    _blocks: Mapping[str, Kronecker]

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        blocks: Mapping[str, Kronecker],
        origin: Origin,
    ) -> None:
        super().__init__(adapter_config, mean, blocks, origin)
        for key, block in self._blocks.items():
            if key not in self._mean:
                raise UserError(
                    f"factors of {key!r} have no mean beside them: the adapter has no such tensor"
                )
            if tuple(as_matrix(key, self._mean[key]).shape) != block.shape:
                raise UserError(f"factors of {key!r} are for shape {block.shape}, its mean is "
                                f"{tuple(as_matrix(key, self._mean[key]).shape)}")  # fmt: skip

    def _moved(self, tree: Tree, name: str, x: Tensor) -> None:
        tree[name] += as_matrix(name, x)

    def _coordinates(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        apart = {k: whole(tree[k]).double() - v.double() for k, v in self._mean.items()}
        if any(bool((apart[k] != 0).any()) for k in apart if k not in self._blocks):
            return None
        return {k: as_matrix(k, apart[k]) for k in self._blocks}

    def _pulled(self, jacobian: Mapping[str, Tensor], name: str) -> Tensor:
        return as_matrix(name, jacobian[name])

    def _prior_of(self, name: str) -> tuple[Tensor, Tensor]:
        mean = as_matrix(name, self._mean[name]).double()
        return mean, torch.full_like(mean, self.origin.prior.get(name, 0.0))

    def _kl_diagonal(self, other: DiagonalGaussian) -> float:
        same_keys(self._mean, other.mean(), "the posteriors are not over the same adapter")
        mean, sigma = other.mean(), other.sigma()
        certain = [k for k in mean if k not in sigma]
        if sigma.keys() != self._blocks.keys() or any(bool((v == 0).any()) for v in sigma.values()):
            return math.inf
        if any(not torch.equal(mean[k], self._mean[k]) for k in certain):
            return math.inf
        return sum(
            kl_to_diagonal(
                block,
                as_matrix(key, self._mean[key].double() - mean[key]),
                as_matrix(key, sigma[key].double().square().reciprocal()),
            )
            for key, block in self._blocks.items()
        )

    def uncertain(self) -> list[str]:
        return list(self._blocks)

    def precision_diag(self) -> Tree:
        found = {k: torch.full_like(v, math.inf) for k, v in self._mean.items()}
        for key, block in self._blocks.items():
            found[key] = as_matrix(key, block.variance().reciprocal()).float().contiguous()
        return found

    def tensors(self) -> Tree:
        """<key>.small_vectors, .small_values, .large_vectors, .large_values, .rest, .delta. Where matrices share their
        large side it is there once, and the others have <key>.large_of: the number of the one that has it, among the
        uncertain keys in order."""
        found: Tree = {}
        keys = list(self._blocks)
        owner: dict[int, int] = {}
        for number, key in enumerate(keys):
            block = self._blocks[key]
            first = owner.setdefault(id(block.large_vectors), number)
            for part in PARTS:
                if first == number or not part.startswith("large"):
                    found[f"{key}.{part}"] = getattr(block, part).float()
            if first != number:
                found[key + SHARED] = torch.tensor(float(first))
        return found

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> KroneckerGaussian:
        ends = (*(f".{part}" for part in PARTS), SHARED)
        wrong = [name for name in tensors if not name.endswith(ends)]
        if wrong:
            raise UserError(f"a kronecker posterior has no tensor {wrong[0]!r}")
        keys = sorted(name.removesuffix(".delta") for name in tensors if name.endswith(".delta"))
        blocks = {}
        for key in keys:
            shared = tensors.get(key + SHARED)
            source = key if shared is None else keys[int(shared)]
            names = [f"{source if part.startswith('large') else key}.{part}" for part in PARTS]
            missing = [name for name in names if name not in tensors]
            if missing:
                raise UserError(f"the kronecker posterior lacks {missing[0]!r}: its file is not whole")
            blocks[key] = Kronecker(*(tensors[name] for name in names))
        return cls(adapter_config, mean, blocks, origin)


def as_matrix(key: str, tensor: Tensor) -> Tensor:
    """[..., small side, large side]: A as it is, B transposed (its own inverse)."""
    return tensor.mT if key.endswith(B) else tensor
