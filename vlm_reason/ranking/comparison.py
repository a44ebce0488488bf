"""How well a ranker did on judged samples, and how one did against another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..stats import PairedEstimate, paired_difference, wilson
from ..store import SampleRecord
from ..types import Estimate
from .members import MemberRanking
from .outcomes import Outcome, outcome
from .posterior import Ranking


@dataclass(frozen=True)
class Ranked:
    """One method over all problems.

    outcomes: problem -> right, not_chosen or never_sampled. ess, mass: medians over problems; NaN where the method has
    none. low_ess, heavy_tail: problems with that flag.
    """

    method: str
    outcomes: Mapping[str, Outcome]
    accuracy: Estimate
    unanswered: int
    ess: float
    mass: float
    draws: float
    low_ess: int
    heavy_tail: int

    def minus(self, other: Ranked) -> PairedEstimate:
        """Difference of accuracy, paired by problem."""
        return paired_difference(_right(self.outcomes), _right(other.outcomes))

    def to_json(self) -> dict[str, Any]:
        count = Counter(self.outcomes.values())
        return {
            "method": self.method,
            "problems": len(self.outcomes),
            "accuracy": self.accuracy.to_json(),
            "selection_failures": count["not_chosen"],
            "coverage_failures": count["never_sampled"],
            "unanswered": self.unanswered,
            "ess": self.ess,
            "mass": self.mass,
            "low_ess": self.low_ess,
            "heavy_tail": self.heavy_tail,
        }

    def warnings(self) -> list[str]:
        """What a reader must know of the importance weights, a line each."""
        n, found = len(self.outcomes), []
        if self.low_ess:
            found.append(
                f"{self.method}: the effective sample size is below 2, or a tenth of the rationales, in {self.low_ess} "
                f"of {n} problems (median {self.ess:.1f} of {self.draws:.0f}): single rationales decide there"
            )
        if self.heavy_tail:
            found.append(
                f"{self.method}: Pareto k of the weights is too large for the number of rationales in "
                f"{self.heavy_tail} of {n} problems: posteriors and their errors are not to be trusted there"
            )
        return found


def compare_outcomes(
    method: str, groups: Mapping[str, Sequence[SampleRecord]], rankings: Mapping[str, Ranking | MemberRanking]
) -> Ranked:
    """The judged samples of each problem, and what `method` made of them."""
    outcomes = {name: outcome(records, rankings[name].answer) for name, records in groups.items()}
    single = [r for ranking in rankings.values() for r in _singles(ranking)]
    flags = [{f for r in _singles(ranking) for f in r.flags} for ranking in rankings.values()]
    return Ranked(
        method,
        outcomes,
        wilson(list(_right(outcomes).values())),
        sum(ranking.answer is None for ranking in rankings.values()),
        _median([r.ess for r in single]),
        _median([r.mass for r in single]),
        _median([float(len(r.rationales)) for r in single]),
        sum("low_ess" in f for f in flags),
        sum("heavy_tail" in f for f in flags),
    )


def _singles(ranking: Ranking | MemberRanking) -> tuple[Ranking, ...]:
    return ranking.members if isinstance(ranking, MemberRanking) else (ranking,)


def _right(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    return {name: float(found == "right") for name, found in outcomes.items()}


def _median(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.median(finite)) if finite else math.nan
