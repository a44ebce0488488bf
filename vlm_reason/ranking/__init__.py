"""Which answer, and which rationale? Pure functions from one problem's samples to posteriors over both.

    posterior = rank(candidates, method="mixture")

`METHODS` maps a name to its function; a new one is a function `Candidates -> Ranking` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..errors import UserError, nearest
from .best_of_n import best_of_n_mean, best_of_n_sum
from .candidates import Candidates, Ranking, candidates_from_records
from .mixture import mixture
from .scores import score_matrices
from .votes import majority, weighted_vote

Ranker = Callable[[Candidates], Ranking]

METHODS: Mapping[str, Ranker] = MappingProxyType(
    {
        "majority": majority,
        "weighted_vote": weighted_vote,
        "best_of_n": best_of_n_sum,
        "best_of_n_mean": best_of_n_mean,
        "mixture": mixture,
    }
)


def rank(candidates: Candidates, method: str = "mixture") -> Ranking:
    """Rank the answers and rationales of one problem. UserError for an unknown method, for rationales drawn
    behind the answer, and for scores the method needs and the candidates lack."""
    if method not in METHODS:
        raise UserError(f"unknown ranking method {method!r}{nearest(method, METHODS)}")
    return METHODS[method](candidates)


__all__ = [
    "METHODS",
    "Candidates",
    "Ranker",
    "Ranking",
    "candidates_from_records",
    "rank",
    "score_matrices",
]
