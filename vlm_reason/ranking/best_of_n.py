"""Best of N: take the one pair (rationale, answer) with the highest score.

    best_of_n        s_n = log p(z_n, y_n | x)          favours short rationales
    best_of_n_mean   s_n = log p(z_n, y_n | x) / L_n    over-corrects
    best_of_n_reward s_n = a reward model's score
    best_of_n_min, best_of_n_prod, best_of_n_last       s_n from a process reward model's scores of the steps

Classes score as their best pair, so that the first class is the answer of the first rationale. The posteriors
are the softmax of the scores: they order and compare, they are not calibrated probabilities of being right. Their
errors are by bootstrap: they say how far the choice hangs on single draws.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import UserError
from .candidates import Array, Candidates
from .posterior import Ranking, by_max, make_ranking, rationale_shares


def best_of_n_sum(candidates: Candidates) -> Ranking:
    """s_n = log p(z_n, y_n | x)."""
    return _best("best_of_n", candidates, _joint(candidates, "best_of_n"))


def best_of_n_mean(candidates: Candidates) -> Ranking:
    """s_n = log p(z_n, y_n | x) / L_n, L_n the tokens of both."""
    joint = _joint(candidates, "best_of_n_mean")
    return _best(
        "best_of_n_mean", candidates, joint / np.maximum(candidates.need("length", "best_of_n_mean"), 1.0)
    )


def best_of_n_reward(candidates: Candidates) -> Ranking:
    """s_n = r(x, z_n, y_n), a score from outside."""
    return _best("best_of_n_reward", candidates, candidates.need("reward", "best_of_n_reward"))


def best_of_n_min(candidates: Candidates) -> Ranking:
    """s_n = the lowest step score: a chain is as strong as its weakest step (Lightman et al. 2023)."""
    return _best("best_of_n_min", candidates, np.array([min(s) for s in _steps(candidates, "best_of_n_min")]))


def best_of_n_prod(candidates: Candidates) -> Ranking:
    """s_n = sum_t log r_t, of the product of the step scores: the probability that all steps are right, were they
    independent."""
    steps = _steps(candidates, "best_of_n_prod")
    return _best("best_of_n_prod", candidates, np.array([sum(map(_log, s)) for s in steps]))


def best_of_n_last(candidates: Candidates) -> Ranking:
    """s_n = the score of the last step."""
    return _best(
        "best_of_n_last", candidates, np.array([s[-1] for s in _steps(candidates, "best_of_n_last")])
    )


def _joint(candidates: Candidates, method: str) -> Array:
    return candidates.need("logp_trace", method) + candidates.need("logp_own", method)


def _steps(candidates: Candidates, method: str) -> tuple[tuple[float, ...], ...]:
    candidates.need("steps", method)
    steps = candidates.steps or ()
    wrong = next(((n, s) for n, s in enumerate(steps) if not s or not all(0 <= r <= 1 for r in s)), None)
    if wrong is not None:
        raise UserError(
            f"{method} needs step scores in [0, 1], at least one a rationale; problem {candidates.problem_id!r} has "
            f"{list(wrong[1])} for rationale {wrong[0]}"
        )
    return steps


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _best(method: str, candidates: Candidates, score: Array) -> Ranking:
    given = [candidates.class_of(n) for n in range(len(score))]
    names = sorted({name for name in given if name is not None})
    table = np.full((len(score), len(names)), -math.inf)
    for n, name in enumerate(given):
        if name is not None:
            table[n, names.index(name)] = score[n]
    own = table.max(1, initial=-math.inf)
    clusters = candidates.clusters
    return make_ranking(method, candidates, names, by_max(table, clusters), rationale_shares(own, clusters))
