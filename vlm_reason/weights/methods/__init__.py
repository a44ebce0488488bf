"""How posteriors are fitted: one file a method."""

from ..job import Method
from .blob import BLoB
from .concrete_dropout import ConcreteDropout
from .dropout import Dropout
from .ensemble import Ensemble
from .ivon import IVON
from .map import MAP
from .rank_masks import RankMasks
from .temperature import Temperature

METHODS: dict[str, type[Method]] = {
    "blob": BLoB,
    "concrete_dropout": ConcreteDropout,
    "dropout": Dropout,
    "ensemble": Ensemble,
    "ivon": IVON,
    "map": MAP,
    "rank_masks": RankMasks,
    "temperature": Temperature,
}
"""Name -> settings class with `fit(job)`."""

__all__ = ["METHODS"]
