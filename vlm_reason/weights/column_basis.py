"""The same LoRA update in factors whose rows of A can carry isotropic noise.

    B = U diag(d) V^T   ->   B' = U,  A' = diag(d) V^T A,      B' A' = B A
    A' + sigma E   ->   s B' (A' + sigma E) = s B A + s sigma U E

With E standard normal the noise of the update s B A is isotropic in the column space of B: every column has covariance
(s sigma)^2 U U^T, whatever the scale of B against A, which the factors leave open. Nothing is divided by d, which may
be small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .artefact import Tree
from .per_row import A, B


@dataclass(frozen=True)
class ColumnBasis:
    """tree: the adapter with A' and B' in place of A and B, fp32. rows: by key of A', [r, 1], 1 where its row has a
    direction U, else 0 (that row of A' and column of B' are 0)."""

    tree: Tree
    rows: Mapping[str, Tensor]


def column_basis(tree: Mapping[str, Tensor], tolerance: float = 1e-6) -> ColumnBasis:
    """Rotate every pair of LoRA matrices; other tensors stay as they are. Directions with d <= tolerance * max d are
    left out. Layers whose B is 0 have none and no entry in `rows`."""
    rotated = {key: value.detach().cpu().float() for key, value in tree.items()}
    rows: dict[str, Tensor] = {}
    for key in sorted(tree):
        name = key.removesuffix(A)
        if name == key or name + B not in tree or tree[key].ndim != 2 or tree[name + B].ndim != 2:
            continue
        found = _rotated(tree[key], tree[name + B], tolerance)
        if found is not None:
            rotated[key], rotated[name + B], rows[key] = found
    return ColumnBasis(rotated, rows)


def _rotated(a: Tensor, b: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """(A', B', rows) of A [r, n], B [m, r]; None where B is 0."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    u, d, vt = torch.linalg.svd(b, full_matrices=False)  # [m, k], [k], [k, r], k = min(m, r)
    if float(d[0]) == 0:
        return None
    largest = u.gather(
        0, u.abs().argmax(0, keepdim=True)
    )  # the sign of a pair of vectors is open: make it positive
    u, vt = u * largest.sign(), vt * largest.sign().T
    kept = (d > tolerance * d[0]).double()
    size = len(a)
    down, up = torch.zeros_like(a), torch.zeros(len(b), size, dtype=torch.float64)
    down[: len(d)] = (kept * d)[:, None] * (vt @ a)
    up[:, : len(d)] = u * kept
    rows = torch.zeros(size, 1)
    rows[: len(d), 0] = kept.float()
    return down.float(), up.float(), rows
