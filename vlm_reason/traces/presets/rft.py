"""Rejection-sampling fine-tuning (RFT, RAFT, ReST-EM): imitate the samples whose answer is right.

    c_z = c_y = (1/K) 1[answer right]

From a frozen sampler its expected update is P_ref * grad of -KL(pi_ref(z|x,Y) || pi): hard questions count
little. With `proposal="prior"` every window samples from the current model (ReST-EM, RAFT). Yuan et al. 2023
(arXiv 2308.01825); the identity is section 4 of arXiv 2509.22637.
"""

from __future__ import annotations

from typing import Literal

from ...types import Coefficients, Scores
from ..recipe import FROZEN, PRIOR, Evidence, NullGroup, Phase, Recipe, State
from ..weighing import drawn, no_signal, per_answer, rewards


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c = rewards(scores) / drawn(scores)
    return Coefficients(c_z=c, c_y=per_answer(c, scores), null=no_signal(c)), state


def recipe(proposal: Literal["frozen", "prior"] = "frozen", null_group: NullGroup = "skip") -> Recipe:
    phase = Phase(
        name="rft",
        weigh=weigh,
        proposal=FROZEN if proposal == "frozen" else PRIOR,
        evidence=Evidence("accuracy", samples=1),
        targets="sampled",
        null_group=null_group,
    )
    return Recipe("rft", (phase,), traces=8, source="arXiv 2308.01825", optimises="P_ref-weighted forward KL")
