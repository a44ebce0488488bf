"""Sum of outer products of rows, kept as its k leading eigenvectors and the trace of the rest.

    Q = sum_i r_i r_i^T  ~  U diag(q) U^T + rho (I - U U^T),     rho = (tr Q - sum q) / (d - k)

New rows R go in by the thin SVD of [diag(q)^1/2 U^T; R]: exactly where that is small, by subspace iteration from the U
there is otherwise. Exact as long as the rows span no more than k directions, and for k >= d, where Q itself is kept;
the trace is exact always. Nothing of size d x d exists for k < d.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING, _ITERATIONS, _SMALL = 8, 2, 64


class LowRank:
    """size: d; rank: k. Memory k d numbers (d d for k >= d)."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, min(rank, size)
        self.trace = 0.0
        self._dense = rank >= size
        self._held: Tensor | None = None  # Q, or diag(q)^1/2 U^T

    def add(self, rows: Tensor) -> None:
        """rows [m, d], fp32 or fp64."""
        squares = torch.bmm(rows[:, None], rows[:, :, None])  # without a copy of the rows
        self.trace += float(squares.double().sum())
        self._update(rows)

    def merge(self, other: LowRank) -> None:
        """As if the rows of `other` had been added here, up to what truncation has dropped in either."""
        if (self.size, self.rank) != (other.size, other.rank):
            raise ValueError(f"sizes or ranks differ: {self.size, self.rank} and {other.size, other.rank}")
        self.trace += other.trace
        if other._held is None:
            return
        if self._dense:
            self._held = other._held.clone() if self._held is None else self._held + other._held
        else:
            self._update(other._held)

    def numel(self) -> int:
        return 0 if self._held is None else self._held.numel()

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(U [d, k'], q [k'], rho) with k' <= k directions, largest first."""
        if self._held is None:
            return torch.zeros(self.size, 0), torch.zeros(0), 0.0
        if self._dense:
            values, vectors = torch.linalg.eigh(self._held)
            return vectors.flip(1), values.flip(0).clamp_min(0), 0.0
        q = self._held.square().sum(1)
        keep = q > 0
        q = q[keep]
        u = (self._held[keep] / q.sqrt()[:, None]).mT
        left = max(self.trace - float(q.double().sum()), 0.0)
        return u, q, left / (self.size - len(q))

    def _update(self, rows: Tensor) -> None:
        if self._dense:
            gram = rows.mT @ rows
            self._held = gram if self._held is None else self._held.add_(gram)
            return
        parts = [rows] if self._held is None else [self._held, rows]
        if sum(len(part) for part in parts) <= _SMALL:
            _, values, vectors = torch.linalg.svd(torch.cat(parts), full_matrices=False)
            self._held = values[: self.rank, None] * vectors[: self.rank]
            return
        basis = self._start(rows)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(torch.stack([p.mT @ (p @ basis) for p in parts]).sum(0)).Q
        _, values, vectors = torch.linalg.svd(torch.cat([p @ basis for p in parts]), full_matrices=False)
        self._held = values[: self.rank, None] * (vectors[: self.rank] @ basis.mT)

    def _start(self, rows: Tensor) -> Tensor:
        """[d, k + oversampling]: what is held, and directions of noise."""
        width = min(self.rank + _OVERSAMPLING, self.size)
        noise = torch.randn(
            self.size, width, generator=torch.Generator().manual_seed(0), dtype=rows.dtype
        ).to(rows.device)
        if self._held is not None:
            count = min(len(self._held), width)
            norms = self._held[:count].norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
            noise[:, :count] = (self._held[:count] / norms).mT
        return noise
