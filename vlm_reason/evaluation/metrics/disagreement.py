"""Do the members of a posterior disagree?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...stats import OnInvalid
from ...types import Estimate


@dataclass(frozen=True)
class Disagreement:
    """Per item [n], nats: total = H(mean_m p_m), aleatoric = mean_m H(p_m), mutual_information = total -
    aleatoric."""

    total: NDArray[np.float64]
    aleatoric: NDArray[np.float64]
    mutual_information: NDArray[np.float64]


@dataclass(frozen=True)
class AnswerDisagreement(Disagreement):
    """Of sampled answers: also the Miller-Madow corrected value [n], and the mean [n] and p [n] of the null
    (samples shuffled between members)."""

    miller_madow: NDArray[np.float64]
    null_mean: NDArray[np.float64]
    p: NDArray[np.float64]


def disagreement(probabilities: ArrayLike) -> Disagreement:
    """The split of every item, probabilities [M, n, K]."""
    raise NotImplementedError


def mutual_information(probabilities: ArrayLike, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean over items of the BALD score, probabilities [M, n, K]."""
    raise NotImplementedError


def answer_disagreement(
    answers: Sequence[Sequence[Sequence[Hashable]]], *, resamples: int = 200, seed: int = 0
) -> AnswerDisagreement:
    """The split of every item, from sampled answers: answers[i][m] are those of member m to item i."""
    raise NotImplementedError


def bald_batch(probabilities: ArrayLike, size: int, *, max_states: int = 4096) -> tuple[int, ...]:
    """Indices of the batch to label next: greedy joint mutual information (BatchBALD) while K^b is small,
    then the largest single scores."""
    raise NotImplementedError
