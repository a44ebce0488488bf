"""The Monte-Carlo marginal likelihood of an answer: average over rationales what each says of every answer.

    log P(y_a | x) = log (1/N) sum_j p(y_a | x, z_j),   z_j ~ p(z | x)
    P(c) in proportion to the sum of P(y_a | x) over the answers a of class c
    r_j  in proportion to the sum of p(y_a | x, z_j) over the answers a of the best class

The Rao-Blackwellised form of the vote: it uses the probability of an answer where the vote uses one draw of
it, so its variance is lower. Strings are scored first and pooled by class afterwards. Use it only for
rationales drawn from the model that scores (temperature 1, no hint); rationales from another law need
importance weights.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import logsumexp

from .candidates import Array, Candidates, Ranking, make_ranking


def log_marginal(logp_answer: Array) -> Array:
    """[N, A] log p(y_a | x, z_j) -> [A] log (1/N) sum_j p(y_a | x, z_j). A row of -inf (an incomplete
    rationale) counts in N. N = 0 raises ValueError."""
    n = len(logp_answer)
    if n == 0:
        raise ValueError("no rationales: the marginal of an empty set is not defined")
    return np.asarray(logsumexp(logp_answer, axis=0) - math.log(n))


def mixture(candidates: Candidates) -> Ranking:
    """Rank by the marginal above. Answers that cannot be read (class None) take no part."""
    logp = candidates.need("logp_answer", "mixture")
    marginal = log_marginal(logp)
    members: dict[str, list[int]] = {}
    for a, name in enumerate(candidates.classes):
        if name is not None:
            members.setdefault(name, []).append(a)
    classes = {name: float(logsumexp(marginal[columns])) for name, columns in members.items()}
    best = min(classes, key=lambda name: (-classes[name], name), default=None)
    support = [-math.inf] * len(logp) if best is None else logsumexp(logp[:, members[best]], axis=1).tolist()
    return make_ranking("mixture", candidates, classes, support)
