"""From a curvature H / T and a prior precision to a posterior, its evidence, and the prior precision of the highest.

Each shape knows its eigenvalues, so that log |P| for any delta costs no factorisation (full: one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import same_keys
from ..artefact import Tree
from ..families.core import CoreGaussian
from ..families.diagonal import DiagonalGaussian
from ..families.full import FullGaussian
from ..families.gaussian import Dense
from ..families.kronecker import Kronecker, KroneckerGaussian
from ..per_row import A
from ..posterior import Origin, Posterior
from .accumulators import CoreCurvature, DiagonalCurvature, FullCurvature, KroneckerCurvature
from .evidence import Spectrum, best_deltas, best_deltas_dense


@dataclass(frozen=True)
class Centre:
    """config: of the adapter; mean: theta*, in the dtype it is computed in."""

    config: Mapping[str, Any]
    mean: Mapping[str, Tensor]

    def square(self, key: str) -> float:
        return float(self.mean[key].double().square().sum())

    @property
    def dtype(self) -> torch.dtype:
        """Of a posterior's tensors: fp32 but for an fp64 model."""
        return torch.float64 if any(v.dtype == torch.float64 for v in self.mean.values()) else torch.float32


class Shape(ABC):
    """keys: what carries a delta: the uncertain tensors. Temperatures are in already: H / T."""

    centre: Centre
    keys: list[str]

    @abstractmethod
    def posterior(self, deltas: Mapping[str, float], origin: Origin) -> Posterior:
        """Under the prior N(0, 1 / delta), delta by key."""

    @abstractmethod
    def spectra(self) -> dict[str, Spectrum]:
        """By key; for `full` no such thing exists."""

    def evidence(self, deltas: Mapping[str, float]) -> float:
        """log Z without the likelihood, nats."""
        return sum(s.evidence(deltas[k]) for k, s in self.spectra().items())

    def best(self, group_of: Mapping[str, str]) -> dict[str, float]:
        """The deltas of highest evidence."""
        return best_deltas(self.spectra(), group_of)

    def on_prior(self, prior: DiagonalGaussian, origin: Origin) -> tuple[Posterior, float]:
        """(posterior, log Z without the likelihood) under another posterior as the prior."""
        raise UserError(
            "another posterior as the prior: only for structure diagonal and full, whose precision it adds to"
        )


class DiagonalShape(Shape):
    def __init__(self, curvature: DiagonalCurvature, centre: Centre, temperature: float) -> None:
        self.centre = centre
        self.h = {k: v.double() / temperature for k, v in curvature.sums.items()}
        self.keys = sorted(self.h)

    def spectra(self) -> dict[str, Spectrum]:
        return {
            k: Spectrum(h.flatten(), torch.ones(h.numel(), dtype=torch.float64), self.centre.square(k))
            for k, h in self.h.items()
        }

    def posterior(self, deltas: Mapping[str, float], origin: Origin) -> DiagonalGaussian:
        return self._with({k: h + deltas[k] for k, h in self.h.items()}, origin)

    def on_prior(self, prior: DiagonalGaussian, origin: Origin) -> tuple[Posterior, float]:
        apart, theirs = prior_parts(self, prior)
        total = 0.0
        for k, h in self.h.items():
            total -= float((theirs[k] * apart[k].square() + (h / theirs[k]).log1p()).sum()) / 2
        return self._with({k: h + theirs[k] for k, h in self.h.items()}, origin), total

    def _with(self, precision: Mapping[str, Tensor], origin: Origin) -> DiagonalGaussian:
        sigma = {k: v.rsqrt() for k, v in precision.items()}
        return DiagonalGaussian(self.centre.config, self.centre.mean, sigma, origin)


class KroneckerShape(Shape):
    def __init__(self, curvature: KroneckerCurvature, centre: Centre, temperature: float) -> None:
        self.centre = centre
        self.blocks: dict[str, Kronecker] = {}
        shared: dict[str, tuple[Tensor, Tensor]] = {}

        def held(tensor: Tensor) -> Tensor:  # laid out as it is when read from a file: the same rounding then
            return tensor.to("cpu", centre.dtype).contiguous()

        for key, found in curvature.result().items():
            if found.same not in shared:
                shared[found.same] = held(found.large_vectors), held(found.large_values)
            u, q = shared[found.same]
            v, s = held(found.small_vectors), held(found.small_values / temperature)
            zero = torch.zeros((), dtype=centre.dtype)
            self.blocks[key] = Kronecker(v, s, u, q, zero + found.rest, zero)
        self.keys = sorted(self.blocks)

    def spectra(self) -> dict[str, Spectrum]:
        found = {}
        for key, block in self.blocks.items():
            inside, outside, times = block.spectrum()  # delta is 0
            values = torch.cat([inside.flatten(), outside])
            count = torch.cat(
                [torch.ones(inside.numel()), torch.full((len(outside),), float(times))]
            ).double()
            found[key] = Spectrum(values[count > 0], count[count > 0], self.centre.square(key))
        return found

    def posterior(self, deltas: Mapping[str, float], origin: Origin) -> KroneckerGaussian:
        blocks = {
            key: Kronecker(b.small_vectors, b.small_values, b.large_vectors, b.large_values, b.rest,
                           torch.full_like(b.rest, deltas[key]))
            for key, b in self.blocks.items()
        }  # fmt: skip
        return KroneckerGaussian(self.centre.config, self.centre.mean, blocks, origin)


class FullShape(Shape):
    def __init__(self, curvature: FullCurvature, centre: Centre, temperature: float) -> None:
        self.centre = centre
        self.h = curvature.sums[""].double() / temperature
        self.keys = list(curvature.shapes)
        self.parts: dict[str, slice] = {}
        at = 0
        for key in self.keys:
            size = centre.mean[key].numel()
            self.parts[key] = slice(at, at + size)
            at += size

    def spectra(self) -> dict[str, Spectrum]:
        raise NotImplementedError("weights of all tensors are correlated: no eigenvalues of one tensor alone")

    def evidence(self, deltas: Mapping[str, float]) -> float:
        prior = self._flat(deltas)
        squares = sum(deltas[k] * self.centre.square(k) for k in self.keys)
        return -(squares + self._log_det(prior) - float(prior.log().sum())) / 2

    def best(self, group_of: Mapping[str, str]) -> dict[str, float]:
        squares = {k: self.centre.square(k) for k in self.keys}
        if len(set(group_of.values())) > 1:
            return best_deltas_dense(self.h, self.parts, squares, group_of)
        values = torch.linalg.eigvalsh(self.h).clamp_min(0)
        whole = Spectrum(values, torch.ones_like(values), sum(squares.values()))
        return dict.fromkeys(self.keys, best_deltas({"": whole}, {"": ""})[""])

    def posterior(self, deltas: Mapping[str, float], origin: Origin) -> FullGaussian:
        return self._with(self._flat(deltas), origin)

    def on_prior(self, prior: DiagonalGaussian, origin: Origin) -> tuple[Posterior, float]:
        apart, theirs = prior_parts(self, prior)
        p = torch.cat([theirs[k].flatten() for k in self.keys])
        squares = float((p * torch.cat([apart[k].flatten() for k in self.keys]).square()).sum())
        return self._with(p, origin), -(squares + self._log_det(p) - float(p.log().sum())) / 2

    def _flat(self, deltas: Mapping[str, float]) -> Tensor:
        each = [torch.full((self.centre.mean[k].numel(),), deltas[k], dtype=torch.float64) for k in self.keys]
        return torch.cat(each)

    def _log_det(self, prior: Tensor) -> float:
        return Dense.of(self.h + prior.diag()).log_det()

    def _with(self, prior: Tensor, origin: Origin) -> FullGaussian:
        block = Dense(Dense.of(self.h + prior.diag()).factor.to(self.centre.dtype).contiguous())
        return FullGaussian.of(self.centre.config, self.centre.mean, self.keys, block, origin)


class CoreShape(Shape):
    """Keys are those of A; the mean of R is 1, its prior's 0."""

    def __init__(self, curvature: CoreCurvature, centre: Centre, temperature: float) -> None:
        self.centre = centre
        self.h = {name + A: v / temperature for name, v in curvature.sums.items()}
        self.keys = sorted(self.h)

    def spectra(self) -> dict[str, Spectrum]:
        found = {}
        for key, h in self.h.items():
            values = torch.linalg.eigvalsh(h).clamp_min(0)
            found[key] = Spectrum(values, torch.ones_like(values), float(len(self.centre.mean[key])))
        return found

    def posterior(self, deltas: Mapping[str, float], origin: Origin) -> CoreGaussian:
        blocks = {
            k: Dense(
                Dense.of(h + deltas[k] * torch.eye(len(h), dtype=h.dtype))
                .factor.to(self.centre.dtype)
                .contiguous()
            )
            for k, h in self.h.items()
        }
        return CoreGaussian(self.centre.config, self.centre.mean, blocks, origin)


def prior_parts(shape: Shape, prior: DiagonalGaussian) -> tuple[Tree, Tree]:
    """(theta* - theta_0, P_0) by key, fp64. UserError for a prior that is certain of a weight that is not, or the
    reverse."""
    mean, sigma = prior.mean(), prior.sigma()
    same_keys(sigma, shape.keys, "the prior's uncertain tensors are not those of the posterior")
    if any(bool((v == 0).any()) for v in sigma.values()):
        raise UserError("the prior is certain of some weights (pruned): it cannot be a prior of all of them")
    apart = {k: shape.centre.mean[k].double() - mean[k] for k in shape.keys}
    return apart, {k: sigma[k].double().square().reciprocal() for k in shape.keys}
