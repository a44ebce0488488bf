"""VeriFree: REINFORCE on the probability (not its log) of the one reference answer; no verifier.

    R_k = pi(y*|x,z_k),   c_z = (1/K)( R_k - mean_{j != k} R_j ),   c_y = R_k / K        gradient of pi(y*|x)

Plain probabilities vanish for long answers: use a log-probability method (`jepo`, `latro`) there.
Zhou et al. 2025 (arXiv 2505.21493).
"""

from __future__ import annotations

from ...objectives.normalisers import LooMean
from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import drawn, no_signal, rewards


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c_z = LooMean().coefficients(scores.log_evidence, scores.mask)
    c_y = rewards(scores) / drawn(scores)
    return Coefficients(c_z=c_z, c_y=c_y.unsqueeze(-1), null=no_signal(c_z, c_y)), state


def recipe() -> Recipe:
    phase = Phase("verifree", weigh, proposal=PRIOR, evidence=Evidence("logp"), targets="gold")
    return Recipe(
        "verifree", (phase,), traces=8, least_traces=2, source="arXiv 2505.21493", optimises="pi(y*|x)"
    )
