"""Which problems to label next? Active learning over the samples in a store.

    bald               greedy batch: maximise I(y_1 .. y_b ; member), the joint mutual information (BatchBALD, Kirsch et
                       al. 2019, arXiv 1906.08158), which does not pick near copies of one question; exact while the
                       joint answers can be listed, then by single scores
    entropy            H[P], the largest first: also picks what is merely random
    least_confidence   1 - max P, the largest first
    random             a seeded draw, the baseline that the others must beat

P is the posterior over answers that a ranker gives to the sampled ones; no reference answer is used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .beliefs import Belief
from .metrics import bald_batch

By = Literal["bald", "entropy", "least_confidence", "random"]
WAYS: tuple[By, ...] = get_args(By)


@dataclass(frozen=True)
class Acquired:
    """A chosen problem. score: its own mutual information (small-sample excess taken off), entropy or 1 - confidence,
    NaN for `random`; it need not fall along a `bald` batch, whose order is by what each adds."""

    problem_id: str
    score: float


def acquire(believed: Mapping[str, Belief], by: By, size: int, seed: int = 0) -> list[Acquired]:
    """`size` problems to label, fewer if there are not so many. UserError for size < 1, and for `bald` with a single
    member: disagreement needs two."""
    if size < 1:
        raise UserError(f"size must be >= 1, got {size}")
    if by == "random":
        chosen = random.Random(seed).sample(sorted(believed), min(size, len(believed)))
        return [Acquired(problem, math.nan) for problem in chosen]
    if by == "bald":
        return _bald(believed, size)
    score: Callable[[Belief], float] = (
        (lambda b: b.total_entropy) if by == "entropy" else (lambda b: 1 - b.confidence)
    )
    scored = {problem: score(b) for problem, b in believed.items()}
    # where no answer could be read there is no entropy: nothing is less certain
    order = sorted(scored, key=lambda p: (-math.inf if math.isnan(scored[p]) else -scored[p], p))
    return [Acquired(problem, scored[problem]) for problem in order[:size]]


def _bald(believed: Mapping[str, Belief], size: int) -> list[Acquired]:
    members = max((len(b.ranking.members) for b in believed.values()), default=0)
    if members < 2:
        raise UserError(
            "bald needs samples of two or more members, and these are of one model: evaluate with members=[...], or "
            "choose by entropy"
        )
    names = sorted(problem for problem, b in believed.items() if b.heard > 1)
    if not names:
        raise UserError(
            "bald compares what members answer, and no problem has readable answers of two members: draw more "
            "samples, or choose by entropy"
        )
    probabilities = member_probabilities([believed[n] for n in names], members)
    picked = bald_batch(probabilities, min(size, len(names)))
    return [Acquired(names[i], believed[names[i]].mutual_information_corrected) for i in picked]


def member_probabilities(believed: Sequence[Belief], members: int) -> NDArray[np.float64]:
    """[M, n, K]: P_m over the answers of problem i, padded with zeros to the most answers any problem has. A member
    without a readable answer gets the others' mean: it neither agrees nor disagrees."""
    width = max(len(b.ranking.classes) for b in believed)
    table = np.zeros((members, len(believed), width))
    for i, b in enumerate(believed):
        place = {name: k for k, name in enumerate(b.ranking.classes)}
        rows = list(b.ranking.members) + [None] * (members - len(b.ranking.members))
        for m, ranking in enumerate(rows):
            if ranking is None or not ranking.classes:
                table[m, i, : len(place)] = b.ranking.posterior
            else:
                for name, p in zip(ranking.classes, ranking.posterior, strict=True):
                    table[m, i, place[name]] = p
    return table
