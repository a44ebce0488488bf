"""Answer sets that hold the right answer with a promised probability (split conformal prediction: Vovk et al. 2005;
Angelopoulos & Bates 2021, arXiv 2107.07511).

The promise is on average over calibration sets, and only for items drawn like the calibration items; not for each
kind of item, and not after a shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from ...errors import UserError, nearest
from ...stats import OnInvalid, group_sums, mean_interval, wilson
from ...types import Estimate
from .answers import Answers, classes, sampled, unreadable
from .inputs import Array, Ragged, share
from .proper import Probabilities, class_vectors

Score = Literal["lac", "aps"]


@dataclass(frozen=True)
class ConformalResult:
    """Sets for the test items, and how they did.

    quantile       the threshold: a class is in the set where its score is at most that. +inf: everything is, because
                   the calibration set is too small for alpha (flag `calibration too small`), or the right answer of
                   more than alpha of its items was never sampled (flag `unreachable`)
    band           central 95 % of the coverage that calibration sets of this size give, Beta(n + 1 - l, l), l =
                   floor((n + 1) alpha); (1, 1) for l = 0
    coverage       share of test items whose set holds the right answer; `size` the mean size of a set, `singletons` and
                   `empty` the shares of sets with one and with no member
    members, sizes the sets one after the other; `sets` cuts them
    """

    alpha: float
    score: str
    n_calibration: int
    quantile: float
    band: tuple[float, float]
    coverage: Estimate
    size: Estimate
    singletons: Estimate
    empty: Estimate
    members: Sequence[Any]
    sizes: NDArray[np.int64]

    @property
    def sets(self) -> tuple[tuple[Any, ...], ...]:
        """The set of every test item: class indices, or answers."""
        ends = np.cumsum(self.sizes).tolist()
        return tuple(tuple(self.members[a:b]) for a, b in zip([0, *ends], ends, strict=False))

    def to_json(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "score": self.score,
            "n_calibration": self.n_calibration,
            "quantile": self.quantile if math.isfinite(self.quantile) else None,
            "band": list(self.band),
            "coverage": self.coverage.to_json(),
            "size": self.size.to_json(),
            "singletons": self.singletons.to_json(),
            "empty": self.empty.to_json(),
        }


def conformal_quantile(scores: ArrayLike, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n calibration scores; +inf if that index exceeds n. Scores may be
    +inf (an answer that was never sampled), not NaN."""
    share("alpha", alpha)
    values = np.asarray(scores, dtype=float).ravel()
    if np.isnan(values).any():
        raise UserError(f"score {int(np.argmax(np.isnan(values)))} is NaN; a score must be a number, or +inf")
    index = len(values) + 1 - _below(len(values), alpha)
    return math.inf if index > len(values) else float(np.partition(values, index - 1)[index - 1])


def coverage_band(n: int, alpha: float) -> tuple[float, float]:
    """Central 95 % of the coverage over calibration sets of n items: Beta(n + 1 - l, l), l = floor((n + 1) alpha)."""
    l = _below(n, share("alpha", alpha))
    if l == 0:
        return 1.0, 1.0
    low, high = beta.ppf([0.025, 0.975], n + 1 - l, l)
    return float(low), float(high)


def conformal(
    probabilities: Probabilities,
    labels: ArrayLike,
    test_probabilities: Probabilities,
    test_labels: ArrayLike,
    alpha: float = 0.1,
    score: Score = "lac",
    *,
    on_invalid: OnInvalid = "raise",
) -> ConformalResult:
    """Sets of classes, calibrated on (probabilities, labels) and measured on the test pair; K may differ between items.

        lac  s(y) = 1 - p_y: the smallest sets on average (Sadinle et al. 2019), too small on hard items, empty at times
        aps  s(y) = sum of all p_k >= p_y: sets that grow with the difficulty (Romano et al. 2020, arXiv 2006.02544;
             without randomisation, so a little too large)

    The calibration items must not have been trained on or tuned on. Items with invalid probabilities
    raise, or are dropped from either side (`coverage.n_dropped` counts those of the test side)."""
    if score not in ("lac", "aps"):
        raise UserError(f"unknown score {score!r}{nearest(str(score), ('lac', 'aps'))}")
    calibration, _ = class_vectors(probabilities, labels, on_invalid)
    test, dropped = class_vectors(test_probabilities, test_labels, on_invalid)
    own = _class_scores(calibration.rows, score)[calibration.rows.start + calibration.label]
    threshold = conformal_quantile(own, alpha)
    scores = _class_scores(test.rows, score)
    inside = scores <= threshold + 1e-12
    sizes = group_sums(test.rows.item, inside.astype(float), len(test.rows.size)).astype(np.int64)
    members = (np.arange(len(scores)) - test.rows.start[test.rows.item])[inside]
    covered = inside[test.rows.start + test.label]
    flags = () if math.isfinite(threshold) else ("calibration too small",)
    found = _result(alpha, score, len(own), threshold, covered, sizes, members.tolist(), flags)
    return replace(found, coverage=replace(found.coverage, n_dropped=dropped))


def conformal_answers(
    answers: Answers,
    gold: Sequence[Any],
    test_answers: Answers,
    test_gold: Sequence[Any],
    alpha: float = 0.1,
) -> ConformalResult:
    """Sets of sampled answers: an answer scores 1 - its share of the item's samples (unread samples stay in the
    denominator and are never candidates). A gold answer that was not sampled scores +inf, so coverage above pass@S
    cannot be had: the flag `unreachable` says that alpha asks for it, and then the sets are all answers sampled, most
    votes first."""
    own = _gold_scores(answers, gold)
    threshold = conformal_quantile(own, alpha)
    samples = sampled(test_answers)
    found = classes(samples)
    inside = 1 - found.count / samples.size[found.item] <= threshold + 1e-12
    sizes = np.bincount(found.item[inside], minlength=len(samples.size))
    covered = _gold_scores(test_answers, test_gold) <= min(threshold + 1e-12, 1.0)
    small = len(own) + 1 - _below(len(own), alpha) > len(own)
    flags = () if math.isfinite(threshold) else ("calibration too small",) if small else ("unreachable",)
    order = np.lexsort((found.first, -found.count, found.item))
    members = [samples.names[c] for c in found.code[order][inside[order]].tolist()]
    return _result(alpha, "1 - vote share", len(own), threshold, covered, sizes, members, flags)


def _below(n: int, alpha: float) -> int:
    """floor((n + 1) alpha), where 0.1 means a tenth."""
    return math.floor((n + 1) * alpha + 1e-9)


def _class_scores(vectors: Ragged, score: Score) -> Array:
    """[N]: the score of every class of every item."""
    if score == "lac":
        return 1.0 - vectors.flat
    order = np.lexsort((-vectors.flat, vectors.item))
    p, item = vectors.flat[order], vectors.item[order]
    total = np.cumsum(p)
    total -= np.concatenate([[0.0], total])[vectors.start][item]
    last = np.ones(len(p), dtype=bool)  # equal probabilities share the sum up to the last of them
    last[:-1] = (p[1:] != p[:-1]) | (item[1:] != item[:-1])
    at_last = np.flatnonzero(last)[np.cumsum(last) - last]
    scores = np.empty(len(p))
    scores[order] = total[at_last]
    return scores


def _gold_scores(answers: Answers, gold: Sequence[Any]) -> Array:
    """[n]: 1 - vote share of the gold answer, +inf where it was never sampled."""
    samples = sampled(answers)
    if len(gold) != len(samples.size):
        raise UserError(f"{len(samples.size)} items in answers but {len(gold)} in gold")
    found = classes(samples)
    score = np.full(len(samples.size), np.inf)
    for i, answer in enumerate(gold):
        if unreadable(answer):
            raise UserError(
                f"gold[{i}] is {answer!r}; an item without a right answer cannot be judged, leave it out"
            )
    for i, code, count in zip(found.item.tolist(), found.code.tolist(), found.count.tolist(), strict=True):
        if samples.names[code] == gold[i]:
            score[i] = 1 - count / samples.size[i]
    return score


def _result(
    alpha: float,
    score: str,
    n: int,
    threshold: float,
    covered: NDArray[np.bool_],
    sizes: NDArray[np.int64],
    members: Sequence[Any],
    flags: tuple[str, ...],
) -> ConformalResult:
    coverage = wilson(covered)
    return ConformalResult(
        alpha,
        score,
        n,
        threshold,
        coverage_band(n, alpha),
        replace(coverage, flags=(*coverage.flags, *flags)),
        mean_interval(sizes),
        wilson(sizes == 1),
        wilson(sizes == 0),
        members,
        sizes,
    )
