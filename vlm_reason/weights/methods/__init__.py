"""How posteriors are fitted: one file a method."""

from ..job import Method
from .concrete_dropout import ConcreteDropout
from .dropout import Dropout
from .map import MAP
from .rank_masks import RankMasks

METHODS: dict[str, type[Method]] = {
    "concrete_dropout": ConcreteDropout,
    "dropout": Dropout,
    "map": MAP,
    "rank_masks": RankMasks,
}
"""Name -> settings class with `fit(job)`."""

__all__ = ["METHODS"]
