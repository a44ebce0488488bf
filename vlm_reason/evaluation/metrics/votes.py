"""Self-consistency: the answer most samples agree on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...types import Estimate

Answers = Sequence[Sequence[Hashable]]
"""answers[i]: the canonical answers of the samples of item i. None, -1 and NaN: could not be read."""


@dataclass(frozen=True)
class Votes:
    """Arrays of one entry an item: the winning answer (None where nothing could be read), its share of all
    samples (unread ones count in the denominator) and the number of unread samples."""

    answer: tuple[Any, ...]
    share: NDArray[np.float64]
    unparsed: NDArray[np.int64]


def vote_fraction(answers: Answers) -> Votes:
    """The winner of each item's vote and its share, the confidence of self-consistency. Ties go to the
    answer that was sampled first."""
    raise NotImplementedError


def maj_at_k(
    answers: Answers,
    gold: Sequence[Any],
    k: int,
    weights: Sequence[ArrayLike] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """Expected correctness of the majority of k samples. gold[i]: the right canonical answer, or a set of
    them."""
    raise NotImplementedError


def maj_at_k_judged(
    answers: Answers,
    correct: Sequence[ArrayLike],
    k: int,
    weights: Sequence[ArrayLike] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """`maj_at_k` where rightness is a verdict on every sample: correct[i] is parallel to answers[i]."""
    raise NotImplementedError
