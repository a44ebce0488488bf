"""Which way is better, for the arrows of tables and for whoever compares two systems."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Direction = Literal[1, 0, -1]

DIRECTION: Mapping[str, Direction] = MappingProxyType(
    {
        "accuracy": 1,
        "pass_at_k": 1,
        "pass_hat_k": 1,
        "maj_at_k": 1,
        "maj_at_k_judged": 1,
        "best_of_k": 1,
        "nll": -1,
        "brier": -1,
        "brier_top": -1,
        "brier_multiclass": -1,
        "ece": -1,
        "mce": -1,
        "classwise_ece": -1,
        "tace": -1,
        "aurc": -1,
        "e_aurc": -1,
        "augrc": -1,
        "prr": 1,
        "risk_at_coverage": -1,
        "coverage_at_risk": 1,
        "auroc": 1,
        "aupr": 1,
        "fpr_at_95": -1,
        "mutual_information": 0,
        "answer_mutual_information": 0,
        "predictive_entropy": 0,
        "semantic_entropy": 0,
        "compare": 0,
    }
)
"""1: higher is better, -1: lower is better, 0: it describes and does not judge. One entry for every function of this
package that returns an Estimate."""
