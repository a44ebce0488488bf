"""LaTRO: the model's own traces rewarded by the answer's log-likelihood, minus the distance to the reference.

    R_k = log pi(y*|x,z_k) - beta log [ pi(z_k|x) / pi_ref(z_k|x) ]
    c_z = (1/K) ( R_k - mean_{j != k} R_j ),   c_y = answer_weight / K

Maximises E_pi[log pi(y*|x,z)] - beta KL(pi(z|x) || pi_ref(z|x)), at beta = 1 a bound of log
E_ref[pi(y*|x,z)]. An incomplete trace has no finite reward: it gets coefficient 0 and enters nobody's
baseline. Chen et al. 2024 (arXiv 2411.04282).
"""

from __future__ import annotations

from functools import partial

import torch

from ...objectives.normalisers import LooMean
from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import drawn, no_signal


def weigh(scores: Scores, state: State, *, beta: float, answer_weight: float) -> tuple[Coefficients, State]:
    assert scores.logp_ref is not None
    reward = scores.log_evidence - beta * (scores.logp_prior - scores.logp_ref)
    c_z = LooMean(acts_on="log w").coefficients(reward, scores.mask)
    finished = torch.isfinite(scores.log_evidence) & scores.mask
    c_y = (answer_weight * finished / drawn(scores)).unsqueeze(-1)
    return Coefficients(c_z=c_z, c_y=c_y, null=no_signal(c_z, c_y)), state


def recipe(beta: float = 0.05, answer_weight: float = 1.0) -> Recipe:
    phase = Phase(
        name="latro",
        weigh=partial(weigh, beta=beta, answer_weight=answer_weight),
        proposal=PRIOR,
        evidence=Evidence("logp"),
        targets="gold",
        needs=frozenset({"logp_prior", "logp_ref"}),
    )
    return Recipe(
        "latro",
        (phase,),
        traces=16,
        least_traces=2,
        source="arXiv 2411.04282",
        optimises="E log pi(y*|z) - beta KL(pi||ref)",
    )
