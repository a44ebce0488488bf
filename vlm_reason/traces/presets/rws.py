"""Reweighted wake-sleep: both models follow the same importance weights of traces from the posterior.

    w_k = pi(z_k|x) pi(y*|x,z_k) / q(z_k|x,y*),   rho = w / sum w
    c_z = c_y = rho     wake theta: gradient of the K-trace bound
    c_q = rho           wake phi: forward KL to the posterior

The forward KL does not lose signal as K grows, which the bound's own phi-gradient (`iwae`) does. One
reference answer must be scorable: for answers with many right strings prefer `vr`. Bornschein & Bengio 2015
(arXiv 1406.2751); Le et al. 2019.
"""

from __future__ import annotations

from ...objectives import log_weights, self_normalised
from ...types import Coefficients, Scores
from ..recipe import POSTERIOR, Evidence, Phase, Recipe, State
from ..weighing import no_signal


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    logw = log_weights(scores.logp_prior, scores.log_evidence, scores.logq)
    rho = self_normalised(logw, scores.mask)
    return Coefficients(c_z=rho, c_q=rho, c_y=rho.unsqueeze(-1), null=no_signal(rho)), state


def recipe() -> Recipe:
    phase = Phase(
        name="rws",
        weigh=weigh,
        trains=("reasoner", "posterior"),
        proposal=POSTERIOR,
        evidence=Evidence("logp"),
        targets="gold",
        needs=frozenset({"logp_prior", "logq"}),
        off_policy=True,
    )
    return Recipe(
        "rws",
        (phase,),
        traces=8,
        least_traces=2,
        source="arXiv 1406.2751",
        optimises="L_K in theta; KL(posterior || q) in phi",
    )
