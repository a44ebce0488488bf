"""Several members of a posterior over weights: what they agree on, and how far they differ.

    P(c) = (1/M) sum_m P_m(c)                                the posterior predictive over answers
    MI   = H(P) - (1/M) sum_m H(P_m)                         what knowing the weights would tell about the answer (BALD)

P_m is a ranking of member m's own candidates, a class it never met having P_m = 0. Each P_m is estimated from few
rationales, and its noise looks like disagreement: to second order the plug-in MI is too high by

    bias = (1 - 1/M) / 2 * sum_c mean_m SE_m(c)^2 / P(c)     ((K-1)(1 - 1/M) / 2S for votes of S samples over K classes)

`mutual_information` has this taken off, and is never below 0; `plug_in` is the raw one. Houlsby et al. 2011 (arXiv
1112.5745).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import entr

from ..errors import UserError
from ..store import SampleRecord
from .candidates import Candidates
from .methods import rank
from .posterior import Ranking, answers_json


@dataclass(frozen=True)
class MemberRanking:
    """classes best first, with `posterior` (their mean over members) and `se`: s_m / sqrt(M) over members, which holds
    the noise within each as well as their differences; of a single member its own. MI in nats. `members`: the ranking
    of each, with its posterior over rationales."""

    method: str
    classes: tuple[str, ...]
    posterior: tuple[float, ...]
    se: tuple[float, ...]
    mutual_information: float
    plug_in: float
    members: tuple[Ranking, ...]

    @property
    def answer(self) -> str | None:
        return self.classes[0] if self.classes else None

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "answer": self.answer,
            "answers": answers_json(self),
            "mutual_information": self.mutual_information,
            "plug_in": self.plug_in,
            "members": [ranking.to_json() for ranking in self.members],
        }


def rank_members(members: Sequence[Candidates], method: str = "mixture") -> MemberRanking:
    """Rank each member's candidates and average. Members without a readable answer are left out of the mean (they say
    nothing about the answer). UserError for no members, or for members of different problems."""
    if not members:
        raise UserError("no members to rank")
    problems = sorted({member.problem_id for member in members})
    if len(problems) > 1:
        raise UserError(f"members to average come from several problems: {', '.join(problems)}")
    rankings = [rank(member, method) for member in members]
    heard = [ranking for ranking in rankings if ranking.classes]
    names = sorted({name for ranking in heard for name in ranking.classes})
    if not names:
        return MemberRanking(method, (), (), (), 0.0, 0.0, tuple(rankings))
    table = np.array([_aligned(r, r.posterior, names) for r in heard])  # [M, C]
    errors = np.array([_aligned(r, r.se, names) for r in heard])
    mean, m = table.mean(0), len(heard)
    shown = mean.round(12)  # equal beliefs stay equal, whatever the order their members are summed in
    se = table.std(0, ddof=1) / math.sqrt(m) if m > 1 else errors[0]
    plug_in = max(0.0, float(entr(mean).sum() - entr(table).sum(1).mean()))
    noise = np.divide((np.nan_to_num(errors) ** 2).mean(0), mean, out=np.zeros_like(mean), where=mean > 0)
    debiased = max(0.0, plug_in - (1 - 1 / m) / 2 * float(noise.sum()))
    order = sorted(range(len(names)), key=lambda c: -shown[c])
    return MemberRanking(
        method,
        tuple(names[c] for c in order),
        tuple(float(shown[c]) for c in order),
        tuple(float(se[c]) for c in order),
        debiased,
        plug_in,
        tuple(rankings),
    )


def _aligned(ranking: Ranking, values: Sequence[float], names: Sequence[str]) -> list[float]:
    own = dict(zip(ranking.classes, values, strict=True))
    return [own.get(name, 0.0) for name in names]


def split_members(records: Sequence[SampleRecord]) -> dict[int | None, list[SampleRecord]]:
    """One problem's samples by the member that drew them; a single entry None where there are no members."""
    groups: dict[int | None, list[SampleRecord]] = {}
    for record in records:
        groups.setdefault(record.member, []).append(record)
    return dict(sorted(groups.items(), key=lambda item: -1 if item[0] is None else item[0]))
