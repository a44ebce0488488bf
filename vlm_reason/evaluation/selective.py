"""Answer only when sure enough: a threshold on the confidence, chosen on one set of problems and used on another.

    answer  <=>  confidence >= t
    R(t) = P(wrong | confidence >= t)        the risk;  P(confidence >= t) the coverage

`certified` picks the lowest t of the fixed list T (GRID) for which the calibration set rejects R(t) > r:

    P( Binomial(n_t, r) <= e_t ) <= delta / |T|        n_t answered, e_t of them wrong

With probability at least 1 - delta over calibration sets its risk on new problems of the same kind is at most r. Given
how many are answered, the errors are binomial; the Bonferroni factor pays for looking at |T| thresholds (the argument
of Geifman & El-Yaniv 2017, arXiv 1705.08500, over a list that does not depend on the data).

`plug-in` picks the lowest t whose calibration risk is at most r. It promises nothing: it is chosen for looking good,
and the risk on new problems is above r about every other time.

When not to use it: when the problems to come are not of the kind that calibrated (see `ood_scores`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom

from ..errors import UserError
from ..stats import wilson
from ..types import Estimate
from .beliefs import Belief
from .metrics import aupr, auroc, fpr_at_95

GRID = (*(j / 20 for j in range(20)), 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
ROUNDING = 1e-9
Rule = Literal["certified", "plug-in"]


@dataclass(frozen=True)
class Threshold:
    """Answer when confidence >= value; +inf: no threshold keeps the risk, answer nothing. coverage, risk: on the n
    calibration problems; bound: upper confidence bound of the risk at level 1 - delta / |T| (1 where nothing is
    answered). tried: |T|."""

    value: float
    rule: Rule
    risk_wanted: float
    delta: float
    n: int
    answered: int
    wrong: int
    bound: float
    tried: int

    @property
    def guaranteed(self) -> bool:
        return self.rule == "certified" and math.isfinite(self.value)

    def to_json(self) -> dict[str, Any]:
        return {
            "threshold": self.value,
            "rule": self.rule,
            "risk_wanted": self.risk_wanted,
            "delta": self.delta,
            "guaranteed": self.guaranteed,
            "calibration": {
                "problems": self.n,
                "answered": self.answered,
                "wrong": self.wrong,
                "coverage": self.answered / self.n,
                "risk": self.wrong / self.answered if self.answered else math.nan,
                "risk_bound": self.bound,
            },
            "thresholds_tried": self.tried,
        }


def choose_threshold(
    confidence: ArrayLike, correct: ArrayLike, risk: float, delta: float = 0.05, rule: Rule = "certified"
) -> Threshold:
    """The threshold of `rule` for the target `risk`, from calibration problems: confidence [n] in [0, 1],
    correct [n] 0/1.

    UserError for a risk or delta outside (0, 1) and for no problems; ValueError for arrays that are not as said."""
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise UserError(f"{name} must be in (0, 1), got {value}")
    c, y = _checked(confidence, correct)
    level = delta / len(GRID)
    best = Threshold(math.inf, rule, risk, delta, len(c), 0, 0, 1.0, len(GRID))
    for t in sorted(GRID, reverse=True):
        kept = _answered(c, t)
        n, wrong = int(kept.sum()), int((1 - y[kept]).sum())
        passes = binom.cdf(wrong, n, risk) <= level if rule == "certified" else wrong <= risk * n + ROUNDING
        if n and passes:
            best = Threshold(
                float(t), rule, risk, delta, len(c), n, wrong, _upper(wrong, n, level), len(GRID)
            )
    return best


def _answered(confidence: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """A share such as 7/20 may come out of a softmax a rounding below itself."""
    return np.asarray(confidence >= threshold - ROUNDING)


def _upper(wrong: int, n: int, level: float) -> float:
    """Clopper and Pearson's upper bound: the largest risk under which so few errors have probability `level`."""
    return 1.0 if wrong == n else float(beta.ppf(1 - level, wrong + 1, n - wrong))


def _checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    c, y = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if c.shape != y.shape or c.ndim != 1:
        raise ValueError(f"confidence {c.shape} and correct {y.shape} must be [n] both")
    if not len(c):
        raise UserError("no problems to calibrate on")
    if not ((c >= 0) & (c <= 1)).all() or not np.isin(y, (0, 1)).all():
        raise ValueError("confidence must be in [0, 1] and correct 0 or 1, none of them NaN")
    return c, y


@dataclass(frozen=True)
class Selected:
    """A threshold on other problems. coverage: share answered; risk: share wrong of those, NaN when none is answered;
    risk_if_all: share wrong if every problem were answered."""

    coverage: Estimate
    risk: Estimate
    risk_if_all: Estimate

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_json() for name in ("coverage", "risk", "risk_if_all")}


def apply_threshold(threshold: Threshold, confidence: ArrayLike, correct: ArrayLike) -> Selected:
    """What the threshold does on problems that did not choose it."""
    c, y = _checked(confidence, correct)
    kept = _answered(c, threshold.value)
    return Selected(wilson(kept), wilson(1 - y[kept]), wilson(1 - y))


OOD_SCORES = ("one_minus_confidence", "entropy", "mutual_information")


def ood_scores(inside: Sequence[Belief], outside: Sequence[Belief]) -> dict[str, dict[str, Estimate]]:
    """Do the uncertainties tell problems of another kind from those known? score -> auroc, aupr (of the outside ones)
    and fpr_at_95. Positive is outside; a problem where a score is not defined is dropped and counted.
    `mutual_information` only with several members."""
    values = {
        "one_minus_confidence": lambda b: 1 - b.confidence,
        "entropy": lambda b: b.total_entropy,
        "mutual_information": lambda b: b.mutual_information_corrected,
    }
    several = any(len(b.ranking.members) > 1 for b in (*inside, *outside))
    positive = np.array([0] * len(inside) + [1] * len(outside))
    found: dict[str, dict[str, Estimate]] = {}
    for name in OOD_SCORES if several else OOD_SCORES[:2]:
        score = np.array([values[name](b) for b in (*inside, *outside)])
        found[name] = {
            "auroc": auroc(score, positive, on_invalid="drop"),
            "aupr": aupr(score, positive, on_invalid="drop"),
            "fpr_at_95": fpr_at_95(score, positive, on_invalid="drop"),
        }
    return found
