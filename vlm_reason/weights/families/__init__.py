"""The families of posteriors: one file a family."""

from ..posterior import Posterior
from .core import CoreGaussian
from .diagonal import DiagonalGaussian
from .full import FullGaussian
from .kronecker import KroneckerGaussian
from .last_layer import LastLayer
from .low_rank_plus_diagonal import LowRankPlusDiagonal
from .masks import Masks
from .mixture import Mixture
from .particles import Particles

FAMILIES: dict[str, type[Posterior]] = {
    CoreGaussian.family: CoreGaussian,
    DiagonalGaussian.family: DiagonalGaussian,
    FullGaussian.family: FullGaussian,
    KroneckerGaussian.family: KroneckerGaussian,
    LastLayer.family: LastLayer,
    LowRankPlusDiagonal.family: LowRankPlusDiagonal,
    Masks.family: Masks,
    Mixture.family: Mixture,
    Particles.family: Particles,
}
"""Name -> class of every family there is."""

__all__ = ["FAMILIES"]
