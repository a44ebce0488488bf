"""Self-consistency: every rationale votes for the canonical class of its answer (Wang et al. 2022, arXiv
2203.11171).

Needs no model and no scores. A rationale whose answer cannot be read abstains; it never votes for
"unreadable".
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import UserError
from .candidates import Array, Candidates, Ranking, make_ranking


def majority(candidates: Candidates) -> Ranking:
    """P(c) = #{n : c(y_n) = c} / #{n that voted}. Rationale n is as good as its class: r_n in proportion to
    P(c(y_n))."""
    return _vote("majority", candidates, np.ones(len(candidates.chosen)))


def weighted_vote(candidates: Candidates) -> Ranking:
    """P(c) = sum_n w_n 1[c(y_n) = c] / sum of all votes. w_n is `candidates.weight` (a reward) where given,
    else exp( (log p(z_n | x) + log p(y_n | x, z_n)) / L_n ), the mean token probability of the pair.
    Rationale n scores w_n P(c(y_n))."""
    if candidates.weight is not None:
        weight = candidates.weight
        if (weight < 0).any():
            raise UserError(f"weighted_vote needs weights >= 0, got {float(weight.min())}")
    else:
        joint = candidates.need("logp_trace", "weighted_vote") + candidates.need("logp_own", "weighted_vote")
        weight = np.exp(joint / np.maximum(candidates.need("length", "weighted_vote"), 1.0))
    return _vote("weighted_vote", candidates, weight)


def _vote(method: str, candidates: Candidates, weight: Array) -> Ranking:
    votes: dict[str, float] = {}
    for n, w in enumerate(weight):
        name = candidates.class_of(n)
        if name is not None:
            votes[name] = votes.get(name, 0.0) + float(w)
    rationale = [
        float(w) * votes[name] if (name := candidates.class_of(n)) is not None else 0.0
        for n, w in enumerate(weight)
    ]
    return make_ranking(
        method, candidates, {name: _log(v) for name, v in votes.items()}, [_log(v) for v in rationale]
    )


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
