"""What the samples of one problem say of its answer: one posterior a member, and their mixture.

    P_m(c)   the ranker's posterior over canonical answers c from the samples of member m
    P(c)     (1/M) sum_m P_m(c)                     the answer is its mode, the confidence its height
    total      H[P]          = - sum_c P(c) log P(c)
    expected   mean_m H[P_m]                        what every member is unsure of (aleatoric)
    mutual information  H[P] - mean_m H[P_m] >= 0   what they disagree about (epistemic; BALD, Houlsby et al. 2011,
                                                    arXiv 1112.5745)

in nats. Few samples a member make that difference too high: `mutual_information_corrected` has the expected excess
taken off (ranking.members). Where no answer could be read the confidence is 0 and the entropies are NaN; with fewer
than two members that have a readable answer the mutual information is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import entropy

from ..engines.base import Engine, Law
from ..ranking import (
    FROM_MODEL,
    Candidates,
    MemberRanking,
    Outcome,
    candidates_from_records,
    lacking,
    outcome,
    rank_members,
    score_candidates,
    split_members,
)
from ..store import SampleRecord

Scored = Mapping[tuple[int | None, str], Candidates]
"""(member, problem) -> candidates."""


@dataclass(frozen=True)
class Belief:
    """`ranking` of all members' samples of one problem, and what became of the answer it puts first."""

    problem_id: str
    ranking: MemberRanking
    outcome: Outcome

    @property
    def right(self) -> bool:
        return self.outcome == "right"

    @property
    def confidence(self) -> float:
        return min(1.0, self.ranking.posterior[0]) if self.ranking.classes else 0.0

    @property
    def heard(self) -> int:
        """Members with a readable answer."""
        return sum(bool(member.classes) for member in self.ranking.members)

    @property
    def total_entropy(self) -> float:
        return float(entropy(self.ranking.posterior)) if self.heard else math.nan

    @property
    def expected_entropy(self) -> float:
        own = [float(entropy(member.posterior)) for member in self.ranking.members if member.classes]
        return math.fsum(own) / len(own) if own else math.nan

    @property
    def mutual_information(self) -> float:
        return self.ranking.plug_in if self.heard > 1 else math.nan

    @property
    def mutual_information_corrected(self) -> float:
        return self.ranking.mutual_information if self.heard > 1 else math.nan

    def to_json(self) -> dict[str, Any]:
        return {
            "answer": self.ranking.answer,
            "right": self.right,
            "outcome": self.outcome,
            "confidence": self.confidence,
            "entropy": self.total_entropy,
            "expected_entropy": self.expected_entropy,
            "mutual_information": self.mutual_information,
            "mutual_information_corrected": self.mutual_information_corrected,
        }


def beliefs(
    records: Sequence[SampleRecord], method: str = "majority", scored: Scored | None = None
) -> dict[str, Belief]:
    """Problem -> belief, from the samples of any number of members. scored: the candidates with what `method` needs a
    model for (`score_members`). UserError where that is missing."""
    made = {}
    for problem, samples in by_problem(records).items():
        candidates = [
            scored[member, problem] if scored is not None else candidates_from_records(own)
            for member, own in split_members(samples).items()
        ]
        ranking = rank_members(candidates, method)
        made[problem] = Belief(problem, ranking, outcome(samples, ranking.answer))
    return made


def needs_model(records: Sequence[SampleRecord], method: str) -> bool:
    """Does ranking these samples by `method` take log-probabilities that are not stored with them?"""
    if not records:
        return False
    first = next(iter(split_members(next(iter(by_problem(records).values()))).values()))
    return bool(FROM_MODEL & set(lacking(candidates_from_records(first), method)))


def score_member(
    engine: Engine,
    cue_ids: Sequence[int],
    records: Sequence[SampleRecord],
    adapter: str | None,
    progress: str | None = None,
) -> dict[tuple[int | None, str], Candidates]:
    """One member's samples, scored untempered by that member."""
    groups = by_problem(records)
    member = records[0].member if records else None
    scored = score_candidates(engine, cue_ids, groups, Law(adapter), progress)
    return {(member, problem): candidates for problem, candidates in scored.items()}


def by_problem(records: Sequence[SampleRecord]) -> dict[str, list[SampleRecord]]:
    groups: dict[str, list[SampleRecord]] = {}
    for record in records:
        groups.setdefault(record.problem_id, []).append(record)
    return groups
