"""The rankers by name, and what each needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..errors import UserError, nearest
from .best_of_n import (
    best_of_n_last,
    best_of_n_mean,
    best_of_n_min,
    best_of_n_prod,
    best_of_n_reward,
    best_of_n_sum,
)
from .bin import bin_eq9, bin_log_mean_exp, bin_released
from .candidates import Candidates
from .mixture import elbo, importance, mixture
from .posterior import Ranking
from .votes import majority, weighted_vote

Ranker = Callable[[Candidates], Ranking]

METHODS: Mapping[str, Ranker] = MappingProxyType(
    {
        "majority": majority,
        "weighted_vote": weighted_vote,
        "best_of_n": best_of_n_sum,
        "best_of_n_mean": best_of_n_mean,
        "best_of_n_reward": best_of_n_reward,
        "best_of_n_min": best_of_n_min,
        "best_of_n_prod": best_of_n_prod,
        "best_of_n_last": best_of_n_last,
        "mixture": mixture,
        "importance": importance,
        "elbo": elbo,
        "bin_released": bin_released,
        "bin_eq9": bin_eq9,
        "bin_log_mean_exp": bin_log_mean_exp,
    }
)

_LIKELIHOOD = ("logp_trace", "logp_own", "length")
_JOINT = ("logp_trace", "logp_answer", "trace_length", "answer_length")

NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "majority": ((),),
        "weighted_vote": (("weight",), ("reward",), _LIKELIHOOD),
        "best_of_n": (("logp_trace", "logp_own"),),
        "best_of_n_mean": (_LIKELIHOOD,),
        "best_of_n_reward": (("reward",),),
        "best_of_n_min": (("steps",),),
        "best_of_n_prod": (("steps",),),
        "best_of_n_last": (("steps",),),
        "mixture": (("logp_answer",),),
        "importance": (("logp_answer", "logp_trace", "logq"),),
        "elbo": (("logp_answer", "logp_trace", "logq"),),
        "bin_released": (_JOINT,),
        "bin_eq9": (_JOINT,),
        "bin_log_mean_exp": (_JOINT,),
    }
)
"""Fields of `Candidates` that a method reads: the first of these sets that is there."""

FROM_MODEL = frozenset({"logp_answer", "logp_trace", "logp_own"})
"""Fields that `score_candidates` fills in, for samples that have token ids."""


def lacking(candidates: Candidates, method: str) -> tuple[str, ...]:
    """The fields that `method` needs and these candidates do not have; () when it can be run."""
    method_named(method)
    absent = [tuple(f for f in fields if getattr(candidates, f) is None) for fields in NEEDS[method]]
    return () if () in absent else absent[-1]


def method_named(method: str) -> Ranker:
    """The ranker; UserError with the nearest name if there is none."""
    if method not in METHODS:
        raise UserError(f"unknown ranking method {method!r}{nearest(method, METHODS)}")
    return METHODS[method]


def rank(candidates: Candidates, method: str = "mixture") -> Ranking:
    """Rank the answers and rationales of one problem. UserError for an unknown method, for rationales drawn
    behind the answer, and for scores the method needs and the candidates lack."""
    return method_named(method)(candidates)
