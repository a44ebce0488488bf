"""The marginal likelihood of an answer: average over rationales what each says of every answer.

    mixture      P(c) = (1/N) sum_j p(c | x, z_j)                    z_j ~ p(z | x)
    importance   P(c) = sum_j w_j p(c | x, z_j) / sum_j w_j          z_j ~ q(z | x),  w_j = p(z_j | x) / q(z_j | x)
    elbo         P(c) ~ exp( mean_j log [ w_j p(c | x, z_j) ] )      z_j ~ q(z | x),  a lower bound on log p(c | x)

    p(c | x, z) = sum_{y in c} p(y | x, z)
    r_j in proportion to w_j p(c^ | x, z_j),    c^ the best class    (w = 1 in the mixture)

The first is the Rao-Blackwellised form of the vote: it uses the probability of an answer where the vote uses one draw
of it, so its variance is lower. With q = p `importance` is `mixture`. With q != p `mixture` converges to
sum_z q(z | x) p(y | x, z), the answer of another model: use it for rationales drawn from the model that scores
(temperature 1, no top-p). `importance` converges to p(y | x) as long as q covers p.

Strings are scored first and pooled by class afterwards. An incomplete rationale is a draw that supports no answer: it
counts in N and in sum w (`mass` says how much is left), and leaves the elbo, which is that of q given completeness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import logsumexp

from ..objectives import effective_sample_size, pareto_k
from .candidates import Array, Candidates
from .posterior import (
    LOW_ESS,
    NAN,
    Ranking,
    Weights,
    by_mean_log,
    by_sum,
    make_ranking,
    rationale_shares,
)


def mixture(candidates: Candidates) -> Ranking:
    """Rank by the Monte-Carlo marginal. Answers that cannot be read (class None) take no part."""
    logp = candidates.need("logp_answer", "mixture")
    return by_marginal("mixture", candidates, candidates.pool(logp), candidates.log_share)


def importance(candidates: Candidates) -> Ranking:
    """Rank by the self-normalised importance estimate of p(c | x). Flags `low_ess` (less than 2, or a tenth of the
    draws) and `heavy_tail` (Pareto k above what N draws can carry)."""
    logp = candidates.need("logp_answer", "importance")
    logw = log_ratio(candidates, "importance")
    weight = candidates.log_share + logw
    return by_marginal("importance", candidates, candidates.pool(logp), weight, weigh(candidates, logw))


def elbo(candidates: Candidates) -> Ranking:
    """Rank by the evidence lower bound of each class. Its gap, KL(q || p(z | x, c)), differs between classes: a ranker
    for a q that was trained towards the posterior, not for tempered samples."""
    logp = candidates.need("logp_answer", "elbo")
    logw = log_ratio(candidates, "elbo")
    names = list(candidates.columns)
    pooled = candidates.pool(logp) + logw[:, None]
    answers = by_mean_log(pooled, candidates.log_share, candidates.clusters)
    own = of_best(names, answers.value, pooled + candidates.log_share[:, None])
    rationales = rationale_shares(own, candidates.clusters)
    return make_ranking("elbo", candidates, names, answers, rationales, weights=weigh(candidates, logw))


def by_marginal(
    method: str,
    candidates: Candidates,
    log_scores: Array,
    log_weight: Array,
    weights: Weights | None = None,
    probabilities: bool = True,
) -> Ranking:
    """P(c) in proportion to sum_n w_n u_n(c), from log u [N, C] and log w [N]. Where u are probabilities of answers,
    mass = sum w u / sum w."""
    support = log_scores + log_weight[:, None]
    names = list(candidates.columns)
    answers = by_sum(support, candidates.clusters)
    rationales = rationale_shares(of_best(names, answers.value, support), candidates.clusters)
    mass = NAN
    if probabilities and names and np.isfinite(log_weight).any():
        mass = math.exp(min(0.0, float(logsumexp(support) - logsumexp(log_weight))))
    return make_ranking(method, candidates, names, answers, rationales, mass, weights)


def of_best(names: Sequence[str], posterior: Array, log_scores: Array) -> Array:
    """[N] the column of the best class, the first by name of equals; -inf without one."""
    if not names or not posterior.any():
        return np.full(len(log_scores), -np.inf)
    return log_scores[:, int(posterior.argmax())]


def log_ratio(candidates: Candidates, method: str) -> Array:
    """[N] log w = log p(z | x) - log q(z | x)."""
    return candidates.need("logp_trace", method) - candidates.need("logq", method)


def weigh(candidates: Candidates, logw: Array) -> Weights:
    """ESS and Pareto k of the weights, one a draw."""
    first = np.unique(candidates.clusters, return_index=True)[1]
    row = torch.from_numpy(logw[first])[None]
    n, ess, k = len(first), float(effective_sample_size(row)), float(pareto_k(row))
    flags = [
        name
        for name, bad in (("low_ess", ess < max(2.0, LOW_ESS * n)), ("heavy_tail", k > k_limit(n)))
        if bad
    ]
    return Weights(ess, k, tuple(flags if n > 1 else ()))


def k_limit(n: int) -> float:
    """The largest Pareto k that n draws can carry: min(0.7, 1 - 1 / log10 n) (Vehtari et al. 2024)."""
    return min(0.7, 1 - 1 / math.log10(n)) if n > 10 else 0.0
