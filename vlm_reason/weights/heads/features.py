"""From a model's last hidden state to the features of a last layer: fixed, affine, about as long as 1.

    r = h / sqrt(mean h^2)          x = c (r - centre)          phi = [P^T x, 1]

in fp32, of the final hidden state h [H] at the last token. centre and c come from the data the map was made for, so
that mean |x|^2 = 1 there: a prior N(0, s^2 I) on the weights is then one of variance about s^2 on the function. P is
H x F with orthonormal columns (pca), Gaussian with variance 1/F (random), or the identity (none). The trailing 1 is
the intercept; preferences have none, since it cancels in phi(a) - phi(b).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...errors import UserError, nearest

Projection = Literal["none", "random", "pca"]
PROJECTIONS: tuple[str, ...] = get_args(Projection)


def rms_normed(hidden: Tensor) -> Tensor:
    """h / sqrt(mean h^2 + 1e-12), fp32 (fp64 stays)."""
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    return hidden * (hidden.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


class FeatureMap(nn.Module):
    """centre [H]; scale c; projection [H, F] or None; intercept: whether a 1 is appended."""

    centre: Tensor
    scale: Tensor
    projection: Tensor | None

    def __init__(self, centre: Tensor, scale: float, projection: Tensor | None, intercept: bool) -> None:
        super().__init__()
        self.register_buffer("centre", centre.detach().clone())
        self.register_buffer("scale", torch.tensor(float(scale), dtype=centre.dtype))
        # in the layout a file brings back: other strides round differently
        self.register_buffer("projection", None if projection is None else projection.contiguous())
        self.intercept = intercept

    @property
    def features(self) -> int:
        """F, the intercept counted."""
        size = len(self.centre) if self.projection is None else self.projection.shape[1]
        return size + self.intercept

    def forward(self, hidden: Tensor) -> Tensor:
        """phi [B, F] of h [B, H]."""
        x = self.scale * (rms_normed(hidden) - self.centre)
        phi = x if self.projection is None else x @ self.projection
        return torch.cat([phi, torch.ones_like(phi[:, :1])], -1) if self.intercept else phi

    def tensors(self) -> dict[str, Tensor]:
        found = {"centre": self.centre, "scale": self.scale.view(1)}
        found["intercept"] = torch.tensor([float(self.intercept)])
        return found if self.projection is None else {**found, "projection": self.projection}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> FeatureMap:
        return FeatureMap(
            tensors["centre"], float(tensors["scale"]), tensors.get("projection"), bool(tensors["intercept"])
        )


def make_map(hidden: Tensor, kind: str, features: int, intercept: bool, seed: int = 0) -> FeatureMap:
    """The map for data with hidden states [N, H]. features: F without the intercept; where that is H or more, or more
    than a pca of N states can have, there are as many as there can be.

    UserError for an unknown projection, no features, or states that are all the same.
    """
    check_projection(kind, features)
    r = rms_normed(hidden)
    centre = r.mean(0)
    x = r - centre
    length = x.square().sum(-1).mean().sqrt()
    if not float(length) > 1e-6:
        raise UserError("all features are the same: a last layer has nothing to tell examples apart by")
    x = x / length
    projection = None
    if kind == "random" and features < x.shape[1]:
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(x.shape[1], features, generator=generator).to(x) / features**0.5
    elif kind == "pca" and features < x.shape[1]:
        projection = principal_directions(x, features)
    return FeatureMap(centre, 1 / float(length), projection, intercept)


def principal_directions(x: Tensor, count: int) -> Tensor:
    """[H, k] orthonormal: the directions of largest variance of centred x [N, H], k = min(count, N - 1, H); each with
    its largest entry positive."""
    count = max(1, min(count, len(x) - 1, x.shape[1]))
    x = x.double()
    if len(x) < x.shape[1]:
        values, left = torch.linalg.eigh(x @ x.mT)
        directions = x.mT @ left[:, -count:]
        directions = torch.linalg.qr(directions.flip(1))[0]
    else:
        directions = torch.linalg.eigh(x.mT @ x)[1][:, -count:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (directions * largest.sign()).float()


def check_projection(kind: str, features: int) -> None:
    if kind not in PROJECTIONS:
        raise UserError(
            f"projection must be one of {', '.join(PROJECTIONS)}, got {kind!r}{nearest(kind, PROJECTIONS)}"
        )
    if features < 1:
        raise UserError(f"features must be >= 1, got {features}")
