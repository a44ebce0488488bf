"""The families of posteriors: one file a family."""

from ..posterior import Posterior
from .diagonal import DiagonalGaussian

FAMILIES: dict[str, type[Posterior]] = {
    DiagonalGaussian.family: DiagonalGaussian,
}
"""Name -> class of every family there is."""

__all__ = ["FAMILIES"]
