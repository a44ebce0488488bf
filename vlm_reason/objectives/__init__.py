"""Pure tensor mathematics of the objectives: no model, no tokenizer, no I/O.

Log weights `logw [groups, K]` in, bounds `[groups]` or weights `[groups, K]` out, with an optional bool mask.
groups.py says what -inf and a masked entry mean; every name below is documented where it is defined.
"""

from .bounds import cubo, elbo, eubo, iwae, log_weights, renyi
from .independence_mh import Chain, metropolis
from .leave_one_out import leave_one_out_log_mean_exp, leave_one_out_mean, vimco_baseline, vimco_signal
from .normalisers import NORMALISERS, Normaliser, normaliser_named
from .null_groups import apply_null_policy, group_scale, null_groups, null_rate
from .psis import Psis, fit_psis, pareto_k, psis_smooth
from .ratios import RATIOS, Clip, EssFloor, Ratio, ratio_named
from .weights import (
    effective_sample_size,
    forward_chi2_weights,
    iwae_score_weights,
    max_weight,
    self_normalised,
    weight_length_correlation,
)

__all__ = [
    "NORMALISERS",
    "RATIOS",
    "Chain",
    "Clip",
    "EssFloor",
    "Normaliser",
    "Psis",
    "Ratio",
    "apply_null_policy",
    "cubo",
    "effective_sample_size",
    "elbo",
    "eubo",
    "fit_psis",
    "forward_chi2_weights",
    "group_scale",
    "iwae",
    "iwae_score_weights",
    "leave_one_out_log_mean_exp",
    "leave_one_out_mean",
    "log_weights",
    "max_weight",
    "metropolis",
    "normaliser_named",
    "null_groups",
    "null_rate",
    "pareto_k",
    "psis_smooth",
    "ratio_named",
    "renyi",
    "self_normalised",
    "vimco_baseline",
    "vimco_signal",
    "weight_length_correlation",
]
