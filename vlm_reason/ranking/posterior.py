"""From scores to a posterior over answers and one over rationales, each number with its standard error.

The N rationales are independent draws, and everything a ranker says is a function of them. With u_n what draw n adds,

    sums          P(c) = T_c / sum T,        T = sum_n u_n                  votes, mixture, importance
    means of logs P(c) = softmax(m)_c,       m = (1/N) sum_n log u_n        elbo, bin_released
    maxima        P(c) = softmax(max_n s_n)_c                               best of N

The first two are smooth: their errors are by the delta method, SE^2 = N/(N-1) sum_n IF_n^2 with IF_n the derivative
of P towards draw n (the sandwich of a ratio estimator). A maximum is not: 1,000 bootstrap resamples of the draws.
Answers behind one rationale are one draw. The candidate answers are taken as given: the posterior is over what was
sampled.

r_n, the posterior of rationale n, is a_n / sum_m a_m. Its error takes z_n as given and its company as drawn again.
An SE of 0 (all agree) means that these draws cannot show a spread, not that there is none (flag `degenerate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from .candidates import Array, Candidates

RESAMPLES = 1000
CHUNK = 1_000_000  # numbers of the resamples held at once
NAN = math.nan

LOW_ESS = 0.1
"""An effective sample size below this share of the draws is flagged, and one below 2: a single rationale decides."""


@dataclass(frozen=True)
class Ranking:
    """classes: canonical answers, best first, with `posterior` (sums to 1; empty when no answer could be read) and
    `se`. rationales: indices of the N rationales, best first; `rationale_posterior` (sums to 1; all zero when none
    supports an answer) and `rationale_se` belong to them in that order. SE is NaN where there are too few draws.

    mass: estimated share of the model's probability that lies on the candidate answers, so that P(c) of all answers
    there are is posterior * mass; NaN where a method estimates none. ess, pareto_k: of the importance weights; NaN
    without weights (pareto_k with fewer than 25 draws too). flags: `degenerate`, `low_ess`, `heavy_tail`.
    `abstained` counts rationales without a readable answer. Ties are broken by the text of the class and by the index,
    never by the order of the answers.
    """

    method: str
    classes: tuple[str, ...]
    posterior: tuple[float, ...]
    rationales: tuple[int, ...]
    rationale_posterior: tuple[float, ...]
    abstained: int = 0
    se: tuple[float, ...] = ()
    rationale_se: tuple[float, ...] = ()
    mass: float = NAN
    ess: float = NAN
    pareto_k: float = NAN
    flags: tuple[str, ...] = ()

    @property
    def answer(self) -> str | None:
        return self.classes[0] if self.classes else None

    def to_json(self) -> dict[str, Any]:
        rationales = zip(self.rationales, self.rationale_posterior, self.rationale_se, strict=True)
        return {
            "method": self.method,
            "answer": self.answer,
            "answers": answers_json(self),
            "rationales": [{"index": n, "posterior": p, "se": s} for n, p, s in rationales],
            "abstained": self.abstained,
            "mass": self.mass,
            "ess": self.ess,
            "pareto_k": self.pareto_k,
            "flags": list(self.flags),
        }


class HasAnswers(Protocol):
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def posterior(self) -> tuple[float, ...]: ...
    @property
    def se(self) -> tuple[float, ...]: ...


def answers_json(ranking: HasAnswers) -> list[dict[str, Any]]:
    answers = zip(ranking.classes, ranking.posterior, ranking.se, strict=True)
    return [{"answer": c, "posterior": p, "se": s} for c, p, s in answers]


@dataclass(frozen=True)
class Shares:
    """A probability vector and its standard errors."""

    value: Array
    se: Array


@dataclass(frozen=True)
class Weights:
    """What the importance weights of a ranking look like."""

    ess: float = NAN
    pareto_k: float = NAN
    flags: tuple[str, ...] = ()


def make_ranking(
    method: str,
    candidates: Candidates,
    names: Sequence[str],
    answers: Shares,
    rationales: Shares,
    mass: float = NAN,
    weights: Weights | None = None,
) -> Ranking:
    """Sort both posteriors. names: the classes that `answers` belongs to, in order of their text."""
    weights = weights or Weights()
    if not answers.value.any():  # no class has any support: none is the answer
        names, answers = [], Shares(answers.value[:0], answers.se[:0])
    by_class = sorted(range(len(names)), key=lambda c: -answers.value[c])
    by_draw = sorted(range(len(rationales.value)), key=lambda n: -rationales.value[n])
    degenerate = bool(len(names)) and not (answers.se > 0).any() and not np.isnan(answers.se).any()
    return Ranking(
        method,
        tuple(names[c] for c in by_class),
        tuple(float(answers.value[c]) for c in by_class),
        tuple(by_draw),
        tuple(float(rationales.value[n]) for n in by_draw),
        sum(candidates.class_of(n) is None for n in range(len(candidates.chosen))),
        tuple(float(answers.se[c]) for c in by_class),
        tuple(float(rationales.se[n]) for n in by_draw),
        mass,
        weights.ess,
        weights.pareto_k,
        (*(("degenerate",) if degenerate else ()), *weights.flags),
    )


# ---- answers -----------------------------------------------------------------------------------------------


def by_sum(log_support: Array, clusters: NDArray[np.int64]) -> Shares:
    """[N, C] log u_n(c) -> P(c) = sum_n u_n(c) / D, D the sum of all; IF_n(c) = (u_n(c) - P(c) sum_k u_n(k)) / D."""
    support = exp_scaled(log_support)
    total = support.sum()
    if total == 0:
        return Shares(np.zeros(support.shape[1]), np.zeros(support.shape[1]))
    share = support.sum(0) / total
    influence = (support - support.sum(1, keepdims=True) * share) / total
    return Shares(share, _sandwich(influence, clusters))


def by_mean_log(log_scores: Array, log_share: Array, clusters: NDArray[np.int64]) -> Shares:
    """[N, C] log u_n(c) -> softmax of m_c, the mean over draws. Rows of -inf throughout (incomplete rationales) take no
    part; a class with probability 0 under any other draw has P = 0."""
    width = log_scores.shape[1]
    whole = np.isfinite(log_scores).any(1)
    if not whole.any() or not width:
        return Shares(np.zeros(width), np.zeros(width))
    rows, own = log_scores[whole], np.exp(log_share[whole])
    base = own / own.sum()
    mean = base @ rows
    if not np.isfinite(mean).any():
        return Shares(np.zeros(width), np.zeros(width))
    share = softmax(mean)
    apart = np.where(np.isfinite(mean), rows - np.where(np.isfinite(mean), mean, 0.0), 0.0)
    influence = base[:, None] * share * (apart - (apart * share).sum(1, keepdims=True))
    return Shares(share, _sandwich(influence, np.unique(clusters[whole], return_inverse=True)[1]))


def by_max(log_scores: Array, clusters: NDArray[np.int64], seed: int = 0) -> Shares:
    """[N, C] -> softmax over classes of the best score in each; SE from a bootstrap over the draws, the ones in which
    no class has a score left out."""
    best = log_scores.max(0, initial=-np.inf)
    if not np.isfinite(best).any():
        return Shares(np.zeros(len(best)), np.zeros(len(best)))
    count = int(clusters.max()) + 1
    value = softmax(best)
    if count == 1:
        return Shares(value, np.full(len(best), NAN))
    top = np.full((count, len(best)), -np.inf)
    np.maximum.at(top, clusters, log_scores)
    top = top[np.lexsort(top.T)]  # so that the order of the samples does not matter
    picked = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    parts = -(-RESAMPLES * top.size // CHUNK)
    resampled = np.concatenate([top[rows].max(1) for rows in np.array_split(picked, parts)])
    resampled = resampled[np.isfinite(resampled).any(1)]
    return Shares(value, softmax(resampled, axis=1).std(0))


def _sandwich(influence: Array, clusters: NDArray[np.int64]) -> Array:
    """sqrt( G/(G-1) sum_g (sum_{n in g} IF_n)^2 ) over the G independent draws; NaN for one."""
    count = int(clusters.max()) + 1
    if count == 1:
        return np.full(influence.shape[1], NAN)
    summed = np.zeros((count, influence.shape[1]))
    np.add.at(summed, clusters, influence)
    error = np.sqrt(count / (count - 1) * (summed**2).sum(0))
    return np.where(error < 1e-12, 0.0, error)  # unanimous up to rounding


# ---- rationales --------------------------------------------------------------------------------------------


def rationale_shares(log_scores: Array, clusters: NDArray[np.int64]) -> Shares:
    """[N] log a_n -> r_n = a_n / sum_m a_m; all 0 where no a_n is above 0."""
    scores = exp_scaled(log_scores)
    total = scores.sum()
    if total == 0:
        return Shares(np.zeros(len(scores)), np.zeros(len(scores)))
    share = scores / total
    summed = np.bincount(clusters, scores).astype(float)[:, None]
    return Shares(share, company_se(summed, -share[:, None] / total, clusters))


def company_se(loadings: Array, gradient: Array, clusters: NDArray[np.int64]) -> Array:
    """Delta-method SE of r_n = g_n(sum over draws of x_g) with draw n's own x held and the M = G - 1 others drawn anew:

    SE_n^2 = M/(M-1) sum_{g != g(n)} (b_n . (x_g - mean of the others))^2,      b_n = dr_n / d(sum)

    loadings x [G, F], gradient b [N, F]. NaN with fewer than two others."""
    others = len(loadings) - 1
    if others < 2:
        return np.full(len(gradient), NAN)
    own, total = loadings[clusters], loadings.sum(0)
    square = ((gradient @ (loadings.T @ loadings)) * gradient).sum(1) - (gradient * own).sum(1) ** 2
    mean = (gradient * (total - own)).sum(1) ** 2 / others
    return np.sqrt(np.maximum(square - mean, 0.0) * others / (others - 1))


def exp_scaled(logs: Array) -> Array:
    """exp(logs - max), so that the largest is 1; zeros where all are -inf."""
    top = logs.max(initial=-np.inf)
    return np.zeros_like(logs) if top == -np.inf else np.exp(logs - top)
