"""Worlds with known answers: every trace enumerated, or a closed form. world.py checks an objective in five lines."""

from .gaussian import Gaussian, LinearGaussian
from .laws import ModelLaws, TableLaws
from .strings import Strings
from .update import ExpectedUpdate, expected_update
from .world import EnumerableWorld

__all__ = [
    "EnumerableWorld",
    "ExpectedUpdate",
    "Gaussian",
    "LinearGaussian",
    "ModelLaws",
    "Strings",
    "TableLaws",
    "expected_update",
]
