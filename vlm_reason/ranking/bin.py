"""Bayesian inference over N rationales, BiN, the inference of LaCoT (arXiv 2510.23925), in its three readings.

With l_ja = log p(z_j, y_a | x) and L_ja the tokens of both,

    bin_released       B(y_a) = (1/N) sum_j l_ja / L_ja              as the released code computes it: a mean of logs
    bin_eq9            B(y_a) = (1/N) sum_j exp(l_ja) / L_ja         as equation 9 prints it: probability over length
    bin_log_mean_exp   B(y_a) = log (1/N) sum_j exp(l_ja / L_ja)     the mean of what equation 9 may have meant

None estimates p(y | x): rationales that were drawn from p already stand for p(z | x), and weighing them by it once more
leaves the shortest and likeliest one to decide. They are here to reproduce and to compare; `mixture` is the estimate.

Classes: the last two are positive scores and add up over the strings of a class; the first is an average log, and a
class is as good as its best string, which keeps the string that the released code chooses on top.
"""

from __future__ import annotations

import numpy as np

from .candidates import Array, Candidates
from .mixture import by_marginal, of_best
from .posterior import Ranking, by_mean_log, make_ranking, rationale_shares


def bin_released(candidates: Candidates) -> Ranking:
    """Mean over complete rationales of the length-normalised log-likelihood; posterior = softmax over classes."""
    joint, length = _joint(candidates, "bin_released")
    scores = joint / length
    whole = np.isfinite(scores).any(1)
    names = list(candidates.columns)
    total = np.exp(candidates.log_share[whole]) @ scores[whole]
    best = [min(own, key=lambda a: (-total[a], candidates.answers[a])) for own in candidates.columns.values()]
    table = scores[:, best] if best else np.empty((len(scores), 0))
    answers = by_mean_log(table, candidates.log_share, candidates.clusters)
    own = of_best(names, answers.value, table + candidates.log_share[:, None])
    rationales = rationale_shares(own, candidates.clusters)
    return make_ranking("bin_released", candidates, names, answers, rationales)


def bin_eq9(candidates: Candidates) -> Ranking:
    """P(c) in proportion to sum_j sum_{y in c} p(z_j, y | x) / L. Draws with a small p(z | x) vanish: with texts of
    hundreds of tokens one rationale decides."""
    joint, length = _joint(candidates, "bin_eq9")
    return _summed("bin_eq9", candidates, joint - np.log(length))


def bin_log_mean_exp(candidates: Candidates) -> Ranking:
    """P(c) in proportion to sum_j sum_{y in c} p(z_j, y | x)^(1/L), the mean token probability."""
    joint, length = _joint(candidates, "bin_log_mean_exp")
    return _summed("bin_log_mean_exp", candidates, joint / length)


def _summed(method: str, candidates: Candidates, log_scores: Array) -> Ranking:
    return by_marginal(
        method, candidates, candidates.pool(log_scores), candidates.log_share, probabilities=False
    )


def _joint(candidates: Candidates, method: str) -> tuple[Array, Array]:
    """log p(z_j, y_a | x) and L_ja, both [N, A]."""
    joint = candidates.need("logp_trace", method)[:, None] + candidates.need("logp_answer", method)
    trace, answer = candidates.need("trace_length", method), candidates.need("answer_length", method)
    return joint, np.maximum(trace[:, None] + answer, 1.0)
