"""GRPO: rewards standardised within the group.

    c_k = (1/K) ( e_k - mean e ) / ( std e + eps )        std with K - 1, eps 1e-4, as in TRL

For right/wrong rewards and K -> infinity its update is sqrt(P / (1 - P)) grad log P: easy questions dominate
more than under `maxrl`, less than under `rloo`. `kl` adds a penalty to the frozen base, `clip` the PPO ratio
clip for windows that are reused. Shao et al. 2024 (arXiv 2402.03300); the identity is section 4 of arXiv
2509.22637.
"""

from __future__ import annotations

from ...objectives.normalisers import MeanStd
from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import every_answer, no_signal


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c = MeanStd().coefficients(scores.log_evidence, scores.mask)
    return Coefficients(c_z=c, c_y=every_answer(c, scores), null=no_signal(c)), state


def recipe(kl: float = 0.0, clip: float | None = 0.2) -> Recipe:
    phase = Phase(
        "grpo",
        weigh,
        proposal=PRIOR,
        evidence=Evidence("accuracy", samples=1),
        targets="sampled",
        kl=kl,
        clip=clip,
    )
    return Recipe(
        "grpo",
        (phase,),
        traces=8,
        least_traces=2,
        source="arXiv 2402.03300",
        optimises="sqrt(P/(1-P)) grad log P",
    )
