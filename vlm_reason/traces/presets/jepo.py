"""JEPO: Jensen bounds of log pi(y*|x) with the model as its own proposal; no verifier.

    R = log pi(y*|x,z)
    one trace   E log pi(y*|x,z)                  c_z = (1/K)( R_k - mean_{j != k} R_j ),  c_y = 1/K
    K traces    E log (1/K) sum_k pi(y*|x,z_k)    c_z = log mean_K - log mean_{-k},        c_y = softmax(R)

The K-trace bound is tighter; the baseline leaves its gradient unchanged. A KL to the base (`kl`) is common.
Tang et al. 2025 (arXiv 2503.19618).
"""

from __future__ import annotations

from typing import Literal

import torch

from ...objectives import self_normalised, vimco_signal
from ...objectives.normalisers import LooMean
from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import drawn, no_signal


def weigh_multi(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c_z = vimco_signal(scores.log_evidence, scores.mask)
    rho = self_normalised(scores.log_evidence, scores.mask)
    return Coefficients(c_z=c_z, c_y=rho.unsqueeze(-1), null=no_signal(c_z, rho)), state


def weigh_single(scores: Scores, state: State) -> tuple[Coefficients, State]:
    """Jensen's bound is -inf as soon as a trace can be incomplete; such a trace gets coefficient 0 instead."""
    c_z = LooMean(acts_on="log w").coefficients(scores.log_evidence, scores.mask)
    finished = torch.isfinite(scores.log_evidence) & scores.mask
    c_y = (finished / drawn(scores)).unsqueeze(-1)
    return Coefficients(c_z=c_z, c_y=c_y, null=no_signal(c_z, c_y)), state


def recipe(bound: Literal["multi", "single"] = "multi", kl: float = 0.0) -> Recipe:
    phase = Phase(
        name="jepo",
        weigh=weigh_multi if bound == "multi" else weigh_single,
        proposal=PRIOR,
        evidence=Evidence("logp"),
        targets="gold",
        kl=kl,
    )
    return Recipe(
        "jepo", (phase,), traces=4, least_traces=2, source="arXiv 2503.19618", optimises="L_K with q = pi"
    )
