"""Self-consistency: every rationale votes for the canonical class of its answer (Wang et al. 2022, arXiv
2203.11171).

Needs no model. A rationale whose answer cannot be read abstains; it never votes for "unreadable".
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from ..errors import UserError
from .candidates import Array, Candidates
from .posterior import Ranking, Shares, by_sum, company_se, make_ranking


def majority(candidates: Candidates) -> Ranking:
    """P(c) = #{n : c(y_n) = c} / #{n that voted}. Rationale n is as good as its class: r_n in proportion to
    P(c(y_n))."""
    return _vote("majority", candidates, np.ones(len(candidates.chosen)))


def weighted_vote(candidates: Candidates) -> Ranking:
    """P(c) = sum_n w_n 1[c(y_n) = c] / sum of all votes; rationale n scores w_n P(c(y_n)).

    w_n is `weight` where given, else sigmoid(reward_n), else exp( (log p(z_n | x) + log p(y_n | x, z_n)) / L_n ), the
    mean token probability of the pair."""
    return _vote("weighted_vote", candidates, _weights(candidates))


def _weights(candidates: Candidates) -> Array:
    weight = candidates.weight
    if weight is not None:
        if (weight < 0).any():
            raise UserError(f"weighted_vote needs weights >= 0, got {float(weight.min())}")
        return weight
    if candidates.reward is not None:
        return np.asarray(expit(candidates.reward))
    joint = candidates.need("logp_trace", "weighted_vote") + candidates.need("logp_own", "weighted_vote")
    return np.exp(joint / np.maximum(candidates.need("length", "weighted_vote"), 1.0))


def _vote(method: str, candidates: Candidates, weight: Array) -> Ranking:
    votes = np.zeros((len(weight), len(candidates.columns)))
    place = {name: c for c, name in enumerate(candidates.columns)}
    for n, w in enumerate(weight):
        name = candidates.class_of(n)
        if name is not None:
            votes[n, place[name]] = w
    cast = np.flatnonzero(votes.any(0))  # a class that nobody voted for is none
    votes, names = votes[:, cast], [list(place)[c] for c in cast]
    with np.errstate(divide="ignore"):
        answers = by_sum(np.log(votes), candidates.clusters)
    return make_ranking(method, candidates, names, answers, _voters(candidates, votes))


def _voters(candidates: Candidates, votes: Array) -> Shares:
    """r_n = w_n V(c_n) / D with V(c) the votes for c, so that D = sum_c V(c)^2 and
    dr_n / dV(c) = w_n 1[c = c_n] / D - 2 r_n V(c) / D."""
    total = votes.sum(0)
    scale = float((total**2).sum())
    if scale == 0:
        return Shares(np.zeros(len(votes)), np.zeros(len(votes)))
    share = votes @ total / scale
    gradient = votes / scale - 2 * np.outer(share, total) / scale
    clusters = candidates.clusters
    loadings = np.zeros((int(clusters.max()) + 1, len(total)))
    np.add.at(loadings, clusters, votes)
    return Shares(share, company_se(loadings, gradient, clusters))
