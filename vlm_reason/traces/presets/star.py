"""STaR: keep the greedy trace if its answer is right; if not, try once more behind the hint, keep that if right.

    c_z = c_y = 1[answer right]            restart from the base model every round

The hinted traces are kept without correction, so what is optimised is only loosely a bound: hints that leak
into the trace are learnt (see `vr` for the corrected weights). Zelikman et al. 2022 (arXiv 2203.14465).
"""

from __future__ import annotations

from ...types import Coefficients, Scores
from ..recipe import Component, Evidence, Phase, Proposal, Recipe, State
from ..weighing import no_signal, per_answer, rewards


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c = (rewards(scores) > 0).to(scores.log_evidence.dtype)
    return Coefficients(c_z=c, c_y=per_answer(c, scores), null=no_signal(c)), state


def recipe() -> Recipe:
    phase = Phase(
        name="star",
        weigh=weigh,
        proposal=Proposal((Component("reasoner", "prior"),), greedy=True),
        evidence=Evidence("accuracy", samples=1),
        targets="sampled",
        null_group="hint_retry",
    )
    return Recipe(
        "star",
        (phase,),
        traces=1,
        reset="base",
        source="arXiv 2203.14465",
        optimises="likelihood of traces that reach y*",
    )
