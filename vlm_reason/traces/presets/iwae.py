"""The K-trace bound itself, maximised in both models.

    L_K = E log (1/K) sum_k w_k <= L_{K+1} <= log pi(y*|x),   w_k = pi(z_k|x) pi(y*|x,z_k) / q(z_k|x,y*)
    c_z = c_y = rho = w / sum w
    c_q = ( log mean w - b_k ) - rho        with VIMCO's leave-one-out baseline b_k

The phi-gradient loses signal-to-noise as K grows (Rainforth et al. 2018): for K above about 8 use `rws`.
Burda et al. 2016 (arXiv 1509.00519); Mnih & Rezende 2016 (arXiv 1602.06725).
"""

from __future__ import annotations

from ...objectives import iwae_score_weights, log_weights, self_normalised
from ...types import Coefficients, Scores
from ..recipe import POSTERIOR, Evidence, Phase, Recipe, State
from ..weighing import no_signal


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    logw = log_weights(scores.logp_prior, scores.log_evidence, scores.logq)
    rho = self_normalised(logw, scores.mask)
    c_q = iwae_score_weights(logw, scores.mask)
    return Coefficients(c_z=rho, c_q=c_q, c_y=rho.unsqueeze(-1), null=no_signal(rho, c_q)), state


def recipe() -> Recipe:
    phase = Phase(
        name="iwae",
        weigh=weigh,
        trains=("reasoner", "posterior"),
        proposal=POSTERIOR,
        evidence=Evidence("logp"),
        targets="gold",
        needs=frozenset({"logp_prior", "logq"}),
    )
    return Recipe("iwae", (phase,), traces=4, source="arXiv 1509.00519", optimises="L_K in theta and phi")
