"""Gauss-Hermite quadrature under a normal law: E g(x), x ~ N(m, v), is about sum_i w_i g(m + sqrt(v) z_i).

Exact for polynomials of degree 2 nodes - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

NODES = 20


@cache
def nodes_and_weights(count: int = NODES) -> tuple[Tensor, Tensor]:
    """z [count], w [count], fp64, of the standard normal law; the weights sum to 1."""
    z, w = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(z), torch.from_numpy(w / w.sum())


def expectation(g: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor, count: int = NODES) -> Tensor:
    """E g(x) of every element of mean and variance; g is applied to one more, last, dimension."""
    z, w = (t.to(mean) for t in nodes_and_weights(count))
    return g(mean[..., None] + variance[..., None].sqrt() * z) @ w
