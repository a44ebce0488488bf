"""Shapes in which the curvature of LoRA factors is kept. Each adds up over examples, and over parts of the data.

    diagonal    sum_n g_n^2                                                        P numbers
    full        sum_n g_n g_n^T                                                    P^2
    kronecker   a matrix apart: small side [r, r] times large side, of rank k      sum of r^2 + k d
    core        sum_n of the gradient with respect to R in B R A, a layer apart    r^4 a layer

Small-side and core sums are fp64; the rest has the dtype of the adapter's computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from ...errors import UserError
from ..per_row import A, B
from .flow import Flow
from .low_rank import LowRank

Over = Literal["both", "A", "B"]
Factors = Literal["gradients", "activations"]


class Accumulator(Protocol):
    def add(self, flows: Mapping[str, Flow], first: bool) -> None:
        """One function of a batch; `first` of it."""

    def merge(self, other: Self) -> None:
        """As if what was added to `other` had been added here."""

    def numel(self) -> int:
        """Numbers held."""


def gradients(flows: Mapping[str, Flow], over: Over) -> dict[str, Tensor]:
    """PEFT key -> [B, *shape]."""
    found = {}
    for name, flow in sorted(flows.items()):
        if over != "B":
            found[name + A] = flow.grad_a()
        if over != "A":
            found[name + B] = flow.grad_b()
    return found


class DiagonalCurvature:
    def __init__(self, over: Over = "both") -> None:
        self.over = over
        self.sums: dict[str, Tensor] = {}

    def add(self, flows: Mapping[str, Flow], first: bool) -> None:
        for key, g in gradients(flows, self.over).items():
            _accumulate(self.sums, key, g.square().sum(0))

    def merge(self, other: DiagonalCurvature) -> None:
        for key, value in other.sums.items():
            _accumulate(self.sums, key, value)

    def numel(self) -> int:
        return sum(v.numel() for v in self.sums.values())


class FullCurvature:
    """largest: number of weights above which to refuse; the matrix is their square."""

    def __init__(self, over: Over = "both", largest: int = 4096) -> None:
        self.over, self.largest = over, largest
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sums: dict[str, Tensor] = {}  # one, under ""

    def add(self, flows: Mapping[str, Flow], first: bool) -> None:
        found = gradients(flows, self.over)
        self.shapes = {key: tuple(g.shape[1:]) for key, g in found.items()}
        size = sum(g[0].numel() for g in found.values())
        if size > self.largest:
            raise UserError(
                f"a full covariance of {size:,} weights needs {size * size * 8 / 1e9:,.1f} GB: the limit is "
                f"{self.largest:,} weights (largest_full); use structure kronecker"
            )
        rows = torch.cat([g.flatten(1) for g in found.values()], 1).double()
        _accumulate(self.sums, "", rows.mT @ rows)

    def merge(self, other: FullCurvature) -> None:
        self.shapes = self.shapes or other.shapes
        for value in other.sums.values():
            _accumulate(self.sums, "", value)

    def numel(self) -> int:
        return sum(v.numel() for v in self.sums.values())


@dataclass(frozen=True)
class KroneckerFactors:
    """S (x) Q of one matrix: S = V diag(s) V^T of its small side, [r, r]; Q = U diag(q) U^T + rest (1 - U U^T) of its
    large side, U [d, k]. `same`: the key whose large side this one's is, where they are shared."""

    small_vectors: Tensor
    small_values: Tensor
    large_vectors: Tensor
    large_values: Tensor
    rest: float
    same: str


class KroneckerCurvature:
    """A matrix apart. `gradients` (exact trace): with G_n the gradient [r, d] of an example,

        S (x) Q = (sum_n G_n G_n^T) (x) (sum_n G_n^T G_n) / sum_n |G_n|^2

    the partial traces of the exact block, so that its trace is exact whatever the data, and the whole block is where it
    is a Kronecker product. `activations` (KFAC, Martens and Grosse 2015, every token by itself): for A,

        S = sum_nt (dg/du_nt) (dg/du_nt)^T / M,    Q = sum_nt x_nt x_nt^T,    M valid tokens

    and for B with u small, dg/dv large. It takes inputs and gradients for independent, and tokens of an example too;
    layers that read the same input share its Q. In either, rank k keeps the large side's leading directions.
    """

    def __init__(self, rank: int = 10, factors: Factors = "gradients", over: Over = "both") -> None:
        if rank < 1:
            raise UserError(f"rank of the large side must be at least 1, got {rank}")
        self.rank, self.factors, self.over = rank, factors, over
        self.small: dict[str, Tensor] = {}
        self.large: dict[str, LowRank] = {}
        self.source: dict[str, str] = {}  # key -> key of `large`
        self.tokens = 0

    def add(self, flows: Mapping[str, Flow], first: bool) -> None:
        if self.factors == "gradients":
            for key, g in gradients(flows, self.over).items():
                g = g if key.endswith(A) else g.mT
                _accumulate(self.small, key, torch.einsum("brd,bsd->rs", g, g).double())
                self._add_large(key, key, g.flatten(0, 1))
            return
        if first:
            self.tokens += int(next(iter(flows.values())).valid.sum())
        for name, flow in sorted(flows.items()):
            valid = flow.valid
            if self.over != "B":
                gu = flow.grad_u[valid]
                _accumulate(self.small, name + A, (gu.mT @ gu).double())
                self.source[name + A] = flow.source + A
                if first and flow.source == name:
                    self._add_large(name + A, name + A, flow.x[valid].to(flow.u.dtype))
            if self.over != "A":
                if first:
                    u = flow.u[valid]
                    _accumulate(self.small, name + B, (u.mT @ u).double())
                self._add_large(name + B, name + B, flow.grad_v[valid])

    def _add_large(self, key: str, source: str, rows: Tensor) -> None:
        self.source[key] = source
        if source not in self.large:
            self.large[source] = LowRank(rows.shape[1], self.rank)
        self.large[source].add(rows)

    def merge(self, other: KroneckerCurvature) -> None:
        if (self.rank, self.factors, self.over) != (other.rank, other.factors, other.over):
            raise ValueError("curvatures of different settings do not add up")
        self.tokens += other.tokens
        self.source = {**other.source, **self.source}
        for key, value in other.small.items():
            _accumulate(self.small, key, value)
        for key, large in other.large.items():
            if key not in self.large:
                self.large[key] = LowRank(large.size, self.rank)
            self.large[key].merge(large)

    def numel(self) -> int:
        small = sum(v.numel() for v in self.small.values())
        return small + sum(v.numel() for v in self.large.values())

    def result(self) -> dict[str, KroneckerFactors]:
        large = {key: value.factors() for key, value in self.large.items()}
        found = {}
        for key, small in sorted(self.small.items()):
            values, vectors = torch.linalg.eigh(small)
            u, q, rest = large[self.source[key]]
            by = float(small.diagonal().sum()) if self.factors == "gradients" else float(self.tokens)
            values = values.clamp_min(0) / by if by > 0 else values * 0
            found[key] = KroneckerFactors(vectors, values, u, q, rest, self.source[key])
        return found


class CoreCurvature:
    """Layer -> [r^2, r^2] over vec(R), row by row."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, flows: Mapping[str, Flow], first: bool) -> None:
        for name, flow in flows.items():
            g = flow.grad_core().flatten(1).double()
            _accumulate(self.sums, name, g.mT @ g)

    def merge(self, other: CoreCurvature) -> None:
        for key, value in other.sums.items():
            _accumulate(self.sums, key, value)

    def numel(self) -> int:
        return sum(v.numel() for v in self.sums.values())


def _accumulate(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    value = value.detach().cpu()
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value.clone()
