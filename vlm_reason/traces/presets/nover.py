"""NOVER: rank the group's traces by the perplexity of the reference answer behind them; the rank is the reward.

    cost_k = -mean_t log pi(y*_t|x,z_k) / max(1, 1 + log10 |z_k|)
    R = rank score in (0, 1],   c = (1/K)( R_k - mean R )

Ranks are immune to the scale of the perplexity and blind to its size: every group pushes as hard, also one
whose traces are all bad. Liu et al. 2025 (arXiv 2505.16022); the reward's format and brevity terms are left
to the verifier.
"""

from __future__ import annotations

from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import drawn, every_answer, no_signal, rewards


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    e, k = rewards(scores), drawn(scores)
    c = (e - e.sum(1, keepdim=True) / k).masked_fill(~scores.mask, 0.0) / k
    return Coefficients(c_z=c, c_y=every_answer(c, scores), null=no_signal(c)), state


def recipe(kl: float = 0.0) -> Recipe:
    phase = Phase(
        "nover", weigh, proposal=PRIOR, evidence=Evidence("perplexity_rank"), targets="sampled", kl=kl
    )
    return Recipe(
        "nover",
        (phase,),
        traces=8,
        least_traces=2,
        source="arXiv 2505.16022",
        optimises="expected rank of y*'s perplexity",
    )
