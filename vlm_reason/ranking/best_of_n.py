"""Best of N: take the one pair (rationale, answer) the model itself finds likeliest.

    sum   s_n = log p(z_n, y_n | x)          favours short rationales
    mean  s_n = log p(z_n, y_n | x) / L_n    over-corrects

Classes score as their best pair, so that the first class is the answer of the first rationale. The posteriors
are the softmax of the scores: they order and compare, they are not calibrated probabilities of being right.
"""

from __future__ import annotations

import math

import numpy as np

from .candidates import Array, Candidates, Ranking, make_ranking


def best_of_n_sum(candidates: Candidates) -> Ranking:
    """s_n = log p(z_n, y_n | x)."""
    return _best("best_of_n", candidates, _joint(candidates, "best_of_n"))


def best_of_n_mean(candidates: Candidates) -> Ranking:
    """s_n = log p(z_n, y_n | x) / L_n, L_n the tokens of both."""
    joint = _joint(candidates, "best_of_n_mean")
    return _best(
        "best_of_n_mean", candidates, joint / np.maximum(candidates.need("length", "best_of_n_mean"), 1.0)
    )


def _joint(candidates: Candidates, method: str) -> Array:
    return candidates.need("logp_trace", method) + candidates.need("logp_own", method)


def _best(method: str, candidates: Candidates, score: Array) -> Ranking:
    classes: dict[str, float] = {}
    rationale = []
    for n, s in enumerate(score):
        name = candidates.class_of(n)
        rationale.append(float(s) if name is not None else -math.inf)
        if name is not None:
            classes[name] = max(classes.get(name, -math.inf), float(s))
    return make_ranking(method, candidates, classes, rationale)
