"""How posteriors are fitted: one file a method."""

from ..job import Method
from .map import MAP

METHODS: dict[str, type[Method]] = {
    "map": MAP,
}
"""Name -> settings class with `fit(job)`."""

__all__ = ["METHODS"]
