"""The families of posteriors: one file a family."""

from ..posterior import Posterior
from .diagonal import DiagonalGaussian
from .last_layer import LastLayer
from .low_rank_plus_diagonal import LowRankPlusDiagonal
from .masks import Masks
from .mixture import Mixture
from .particles import Particles

FAMILIES: dict[str, type[Posterior]] = {
    DiagonalGaussian.family: DiagonalGaussian,
    LastLayer.family: LastLayer,
    LowRankPlusDiagonal.family: LowRankPlusDiagonal,
    Masks.family: Masks,
    Mixture.family: Mixture,
    Particles.family: Particles,
}
"""Name -> class of every family there is."""

__all__ = ["FAMILIES"]
