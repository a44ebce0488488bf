"""How posteriors are fitted: one file a method."""

from ..job import Method
from .batch_ensemble import BatchEnsemble
from .blob import BLoB
from .concrete_dropout import ConcreteDropout
from .core import Core
from .dropout import Dropout
from .ensemble import Ensemble
from .entropy_mcmc import EntropyMCMC
from .ivon import IVON
from .langevin import Langevin
from .laplace import Laplace
from .map import MAP
from .mixture import MixtureOf
from .rank_masks import RankMasks
from .swag import SWAG
from .temperature import Temperature
from .tfb import TFB
from .vbll import VBLL

METHODS: dict[str, type[Method]] = {
    "batch_ensemble": BatchEnsemble,
    "blob": BLoB,
    "concrete_dropout": ConcreteDropout,
    "core": Core,
    "dropout": Dropout,
    "ensemble": Ensemble,
    "entropy_mcmc": EntropyMCMC,
    "ivon": IVON,
    "langevin": Langevin,
    "laplace": Laplace,
    "map": MAP,
    "mixture": MixtureOf,
    "rank_masks": RankMasks,
    "swag": SWAG,
    "temperature": Temperature,
    "tfb": TFB,
    "vbll": VBLL,
}
"""Name -> settings class with `fit(job)`."""

__all__ = ["METHODS"]
