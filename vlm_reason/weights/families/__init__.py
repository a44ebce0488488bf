"""The families of posteriors: one file a family."""

from ..posterior import Posterior
from .diagonal import DiagonalGaussian
from .masks import Masks
from .mixture import Mixture
from .particles import Particles

FAMILIES: dict[str, type[Posterior]] = {
    DiagonalGaussian.family: DiagonalGaussian,
    Masks.family: Masks,
    Mixture.family: Mixture,
    Particles.family: Particles,
}
"""Name -> class of every family there is."""

__all__ = ["FAMILIES"]
