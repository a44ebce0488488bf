"""Forward chi-square variational inference: the posterior follows squared importance weights.

    c_q = w^2 / sum w^2        descends chi^2(posterior || q), i.e. the upper bound CUBO_2 of log pi(y*|x)
    c_z = c_y = w / sum w      the K-trace bound, as in `rws`

Its proposals cover the posterior's tails, which is what importance weights need; the squared weights have a
smaller effective sample size, so it wants larger K. Dieng et al. 2017 (arXiv 1611.00328).
"""

from __future__ import annotations

from ...objectives import forward_chi2_weights, log_weights, self_normalised
from ...types import Coefficients, Scores
from ..recipe import POSTERIOR, Evidence, Phase, Recipe, State
from ..weighing import no_signal


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    logw = log_weights(scores.logp_prior, scores.log_evidence, scores.logq)
    rho = self_normalised(logw, scores.mask)
    c_q = forward_chi2_weights(logw, scores.mask)
    return Coefficients(c_z=rho, c_q=c_q, c_y=rho.unsqueeze(-1), null=no_signal(rho)), state


def recipe() -> Recipe:
    phase = Phase(
        name="chi2",
        weigh=weigh,
        trains=("reasoner", "posterior"),
        proposal=POSTERIOR,
        evidence=Evidence("logp"),
        targets="gold",
        needs=frozenset({"logp_prior", "logq"}),
    )
    return Recipe(
        "chi2",
        (phase,),
        traces=8,
        least_traces=2,
        source="arXiv 1611.00328",
        optimises="L_K in theta; chi2(posterior||q) in phi",
    )
