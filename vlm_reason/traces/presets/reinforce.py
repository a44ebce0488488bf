"""REINFORCE on the probability of a right answer, without a baseline.

    c = (1/K) e(z) on the trace and on the sampled answer        gradient of P(Y_x | x)

The variance is what `rloo` removes at no cost: use this only as a reference. Williams 1992.
"""

from __future__ import annotations

from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import drawn, every_answer, no_signal, rewards


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c = rewards(scores) / drawn(scores)
    return Coefficients(c_z=c, c_y=every_answer(c, scores), null=no_signal(c)), state


def recipe() -> Recipe:
    phase = Phase(
        "reinforce", weigh, proposal=PRIOR, evidence=Evidence("accuracy", samples=1), targets="sampled"
    )
    return Recipe("reinforce", (phase,), traces=8, source="Williams 1992", optimises="P(Y|x)")
