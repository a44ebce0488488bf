"""Which answer, and which rationale? Pure functions from one problem's samples to posteriors over both.

    posterior = rank(candidates, method="mixture")

`METHODS` maps a name to its function; a new one is a function `Candidates -> Ranking`, a line there and one in `NEEDS`.
"""

from __future__ import annotations

from .candidates import Candidates, candidates_from_records
from .comparison import Ranked, compare_outcomes
from .members import MemberRanking, rank_members, split_members
from .methods import FROM_MODEL, METHODS, NEEDS, Ranker, lacking, rank
from .outcomes import Outcome, outcome
from .posterior import Ranking, answers_json
from .scores import score_candidates, score_matrices

__all__ = [
    "FROM_MODEL",
    "METHODS",
    "NEEDS",
    "Candidates",
    "MemberRanking",
    "Outcome",
    "Ranked",
    "Ranker",
    "Ranking",
    "answers_json",
    "candidates_from_records",
    "compare_outcomes",
    "lacking",
    "outcome",
    "rank",
    "rank_members",
    "score_candidates",
    "score_matrices",
    "split_members",
]
