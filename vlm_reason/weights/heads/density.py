"""How usual are features? A Gaussian of few directions: probabilistic PCA (Tipping and Bishop 1999), in closed form.

    phi ~ N(m, W W^T + noise I),      noise = mean of the eigenvalues that W leaves out

Fitted on the training features. Its log density says which inputs are unlike those the head has seen, whatever
the head makes of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = 64


@dataclass(frozen=True)
class FeatureDensity:
    """mean [F]; directions [F, k] orthonormal; variances [k] along them; noise: the variance elsewhere."""

    mean: Tensor
    directions: Tensor
    variances: Tensor
    noise: float

    def log_density(self, phi: Tensor) -> Tensor:
        """[B] of [B, F], nats."""
        apart = (phi - self.mean).double()
        along = apart @ self.directions.double()
        rest = (apart.square().sum(-1) - along.square().sum(-1)).clamp_min(0)
        size, k = self.directions.shape
        log_det = self.variances.double().log().sum() + (size - k) * math.log(self.noise)
        distance = (along.square() / self.variances).sum(-1) + rest / self.noise
        return -(distance + log_det + size * math.log(2 * math.pi)) / 2

    def tensors(self) -> dict[str, Tensor]:
        noise = torch.tensor([self.noise])
        return {"mean": self.mean, "directions": self.directions, "variances": self.variances, "noise": noise}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> FeatureDensity:
        return FeatureDensity(
            tensors["mean"], tensors["directions"], tensors["variances"], float(tensors["noise"])
        )


def fit_density(phi: Tensor, directions: int = DIRECTIONS) -> FeatureDensity:
    """Maximum likelihood for phi [N, F], with at most N - 1 directions, and variances no smaller than 1e-6 of the
    whole."""
    x = phi.double()
    mean = x.mean(0)
    x = x - mean
    size = x.shape[1]
    k = max(1, min(directions, len(x) - 1, size - 1))
    _, singular, right = torch.linalg.svd(x, full_matrices=False)
    values = singular.square() / len(x)
    total = float(values.sum())
    floor = max(1e-6 * total / size, 1e-12)
    noise = max((total - float(values[:k].sum())) / max(1, size - k), floor)
    noise = float(torch.tensor(noise))  # as it will be read from a file
    kept = values[:k].clamp_min(noise)
    return FeatureDensity(mean.float(), right[:k].mT.float().contiguous(), kept.float(), noise)
