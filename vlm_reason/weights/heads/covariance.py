"""Covariances of the rows of a last layer: w_c ~ N(mu_c, S_c), rows independent of one another.

    diagonal   S = diag(d)                        F numbers a row
    low_rank   S = diag(d) + U U^T, U [F, k]      F (k + 1)
    full       S = L L^T, L lower triangular      F^2

R is the number of rows C, or 1 where all rows have the same S. All are positive definite for any values of their
parameters: logarithms are kept of what must be positive.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...errors import UserError, nearest

Structure = Literal["diagonal", "low_rank", "full"]
STRUCTURES: tuple[str, ...] = get_args(Structure)
DENSE_UP_TO = 1024
"""Features up to which closed-form starts may use F x F matrices."""


class Covariance(nn.Module):
    """S of R rows of F features."""

    structure: Structure

    @property
    @abstractmethod
    def rows(self) -> int: ...

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """Standard normals a draw of one row takes."""

    @abstractmethod
    def variance(self, phi: Tensor) -> Tensor:
        """phi^T S phi [B, R] of phi [B, F]."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """[R]"""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Variances [R, F]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """[R, F, F]"""

    @abstractmethod
    def deviation(self, noise: Tensor) -> Tensor:
        """w - mu [C, F] of standard normals [C, noise_size]."""

    @abstractmethod
    def scaled(self, factor: float) -> Covariance:
        """factor S, factor > 0."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` rebuilds it of."""


class Diagonal(Covariance):
    structure = "diagonal"

    def __init__(self, variance: Tensor) -> None:
        """variance [R, F] > 0."""
        super().__init__()
        self.log_variance = nn.Parameter(variance.detach().log())

    @property
    def rows(self) -> int:
        return len(self.log_variance)

    @property
    def noise_size(self) -> int:
        return self.log_variance.shape[1]

    def variance(self, phi: Tensor) -> Tensor:
        return phi.square() @ self.log_variance.exp().mT

    def log_det(self) -> Tensor:
        return self.log_variance.sum(-1)

    def diagonal(self) -> Tensor:
        return self.log_variance.exp()

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal())

    def deviation(self, noise: Tensor) -> Tensor:
        return (self.log_variance / 2).exp() * noise

    def scaled(self, factor: float) -> Diagonal:
        return Diagonal(self.diagonal() * factor)

    def tensors(self) -> dict[str, Tensor]:
        return {"log_variance": self.log_variance.detach()}


class LowRank(Covariance):
    structure = "low_rank"

    def __init__(self, variance: Tensor, factor: Tensor) -> None:
        """variance [R, F] > 0: the diagonal part; factor [R, F, k]."""
        super().__init__()
        self.log_variance = nn.Parameter(variance.detach().log())
        self.factor = nn.Parameter(factor.detach().clone())

    @property
    def rows(self) -> int:
        return len(self.log_variance)

    @property
    def noise_size(self) -> int:
        return self.factor.shape[1] + self.factor.shape[2]

    def variance(self, phi: Tensor) -> Tensor:
        along = torch.einsum("bf,rfk->brk", phi, self.factor)
        return phi.square() @ self.log_variance.exp().mT + along.square().sum(-1)

    def log_det(self) -> Tensor:
        """log |D| + log |I + U^T D^-1 U|"""
        inner = self.factor.mT @ (self.factor * (-self.log_variance).exp()[..., None])
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        return self.log_variance.sum(-1) + torch.linalg.slogdet(eye + inner)[1]

    def diagonal(self) -> Tensor:
        return self.log_variance.exp() + self.factor.square().sum(-1)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.log_variance.exp()) + self.factor @ self.factor.mT

    def deviation(self, noise: Tensor) -> Tensor:
        size = self.factor.shape[1]
        along = (self.factor @ noise[:, size:, None]).squeeze(-1)
        return (self.log_variance / 2).exp() * noise[:, :size] + along

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.log_variance.exp() * factor, self.factor * factor**0.5)

    def tensors(self) -> dict[str, Tensor]:
        return {"log_variance": self.log_variance.detach(), "lowrank": self.factor.detach()}


class Full(Covariance):
    structure = "full"

    def __init__(self, cholesky: Tensor) -> None:
        """cholesky [R, F, F]: lower triangular with a positive diagonal."""
        super().__init__()
        self.log_diagonal = nn.Parameter(cholesky.detach().diagonal(dim1=-2, dim2=-1).log())
        self.below = nn.Parameter(cholesky.detach().tril(-1))

    @property
    def rows(self) -> int:
        return len(self.below)

    @property
    def noise_size(self) -> int:
        return self.below.shape[1]

    def cholesky(self) -> Tensor:
        return self.below.tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def variance(self, phi: Tensor) -> Tensor:
        return (phi @ self.cholesky()).square().sum(-1).mT

    def log_det(self) -> Tensor:
        return 2 * self.log_diagonal.sum(-1)

    def diagonal(self) -> Tensor:
        return self.cholesky().square().sum(-1)

    def dense(self) -> Tensor:
        root = self.cholesky()
        return root @ root.mT

    def deviation(self, noise: Tensor) -> Tensor:
        return (self.cholesky() @ noise[..., None]).squeeze(-1)

    def scaled(self, factor: float) -> Full:
        return Full(self.cholesky() * factor**0.5)

    def tensors(self) -> dict[str, Tensor]:
        return {"log_cholesky": (self.below.tril(-1) + torch.diag_embed(self.log_diagonal)).detach()}


def from_tensors(tensors: dict[str, Tensor]) -> Covariance:
    """What `tensors` gave, to the last bit; log_cholesky has logarithms on its diagonal alone. UserError where they
    are those of no structure."""
    made: Covariance
    if tensors.keys() == {"log_variance"}:
        made = Diagonal(torch.ones_like(tensors["log_variance"]))
    elif tensors.keys() == {"log_variance", "lowrank"}:
        made = LowRank(torch.ones_like(tensors["log_variance"]), tensors["lowrank"])
    elif tensors.keys() == {"log_cholesky"}:
        made = Full(torch.eye(tensors["log_cholesky"].shape[-1]).expand_as(tensors["log_cholesky"]))
    else:
        raise UserError(f"no covariance has the tensors {', '.join(sorted(tensors)) or 'none'}")
    with torch.no_grad():
        if isinstance(made, Full):
            made.log_diagonal.copy_(tensors["log_cholesky"].diagonal(dim1=-2, dim2=-1))
            made.below.copy_(tensors["log_cholesky"].tril(-1))
        elif isinstance(made, Diagonal | LowRank):
            made.log_variance.copy_(tensors["log_variance"])
    return made


def from_precision(structure: str, precision: Tensor, rank: int) -> Covariance:
    """The covariance of `structure` for a Gaussian of precision matrix P [R, F, F]: P^-1 itself if full; 1 / diag(P),
    the closest to it in KL(q || p), if diagonal; that and the k largest directions of P^-1 - diag if low_rank.

    UserError for an unknown structure and a rank outside 1 ... F.
    """
    check_structure(structure, rank)
    if structure == "diagonal":
        return Diagonal(precision.diagonal(dim1=-2, dim2=-1).reciprocal())
    root = torch.linalg.cholesky(precision)
    covariance = torch.cholesky_inverse(root)
    if structure == "full":
        return Full(torch.linalg.cholesky((covariance + covariance.mT) / 2))
    variance = precision.diagonal(dim1=-2, dim2=-1).reciprocal()
    rank = min(rank, variance.shape[-1])
    values, vectors = torch.linalg.eigh(covariance - torch.diag_embed(variance))
    return LowRank(variance, vectors[..., -rank:] * values[..., None, -rank:].clamp_min(0).sqrt())


def check_structure(structure: str, rank: int) -> None:
    if structure not in STRUCTURES:
        raise UserError(
            f"covariance must be one of {', '.join(STRUCTURES)}, got {structure!r}{nearest(structure, STRUCTURES)}"
        )
    if rank < 1:
        raise UserError(f"rank of the covariance must be >= 1, got {rank}")
