"""MaxRL: the group's right traces share weight 1.

    c_k = e_k / sum_j e_j        (0 for a group without a right trace)

For right/wrong rewards the expected update is (1 - (1-P)^K) grad log P: between RL (K = 1) and maximum likelihood
(K -> infinity). The same as self-normalised importance weights with the prior as proposal. arXiv 2602.02710.
"""

from __future__ import annotations

from ...objectives import self_normalised
from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import no_signal, per_answer


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c = self_normalised(scores.log_evidence, scores.mask)
    return Coefficients(c_z=c, c_y=per_answer(c, scores), null=no_signal(c)), state


def recipe() -> Recipe:
    phase = Phase("maxrl", weigh, proposal=PRIOR, evidence=Evidence("accuracy", samples=1), targets="sampled")
    return Recipe(
        "maxrl", (phase,), traces=8, source="arXiv 2602.02710", optimises="(1 - (1-P)^K) grad log P"
    )
