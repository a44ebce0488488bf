"""RLOO: REINFORCE with the mean reward of the other traces of the group as baseline.

    c_k = (1/K) ( e_k - mean_{j != k} e_j )        gradient of P(Y_x | x), unbiased

Needs K >= 2. Ahmadian et al. 2024 (arXiv 2402.14740); Kool et al. 2019.
"""

from __future__ import annotations

from ...objectives.normalisers import LooMean
from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import every_answer, no_signal


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c = LooMean().coefficients(scores.log_evidence, scores.mask)
    return Coefficients(c_z=c, c_y=every_answer(c, scores), null=no_signal(c)), state


def recipe() -> Recipe:
    phase = Phase("rloo", weigh, proposal=PRIOR, evidence=Evidence("accuracy", samples=1), targets="sampled")
    return Recipe("rloo", (phase,), traces=8, least_traces=2, source="arXiv 2402.14740", optimises="P(Y|x)")
