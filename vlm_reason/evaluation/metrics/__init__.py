"""Metrics of answers and of their uncertainty: plain functions on arrays, each returning an Estimate.

Not a number in is an error (`on_invalid="drop"`: a counted drop), nothing in is NaN with the flag `empty`, and no
value depends on the order of the rows, but for `vote_fraction`, where the first of tied answers wins. docs/metrics.md
is the table of them all.
"""

from .accuracy import accuracy
from .answer_disagreement import (
    AnswerDisagreement,
    AnswerInformation,
    answer_disagreement,
    answer_mutual_information,
)
from .calibration import (
    CalibrationEstimate,
    NullBand,
    ReliabilityDiagram,
    ece,
    mce,
    null_band,
    reliability_diagram,
)
from .classwise import classwise_ece, tace
from .comparison import Comparison, compare, compare_tasks
from .conformal import ConformalResult, conformal, conformal_answers, conformal_quantile, coverage_band
from .detection import RocCurve, aupr, auroc, fpr_at_95, roc_curve
from .direction import DIRECTION, Direction
from .disagreement import Disagreement, bald_batch, disagreement, mutual_information
from .entropy import (
    entailment_clusters,
    p_true,
    predictive_entropies,
    predictive_entropy,
    semantic_entropies,
    semantic_entropy,
)
from .proper import brier, brier_multiclass, brier_top, nll
from .repeats import best_of_k, pass_at_k, pass_at_k_of_item, pass_hat_k, pass_hat_k_of_item
from .selective import (
    RiskCoverage,
    augrc,
    aurc,
    coverage_at_risk,
    e_aurc,
    prr,
    risk_at_coverage,
    risk_coverage,
)
from .votes import Votes, maj_at_k, maj_at_k_judged, vote_fraction

__all__ = [
    "DIRECTION",
    "AnswerDisagreement",
    "AnswerInformation",
    "CalibrationEstimate",
    "Comparison",
    "ConformalResult",
    "Direction",
    "Disagreement",
    "NullBand",
    "ReliabilityDiagram",
    "RiskCoverage",
    "RocCurve",
    "Votes",
    "accuracy",
    "answer_disagreement",
    "answer_mutual_information",
    "augrc",
    "aupr",
    "aurc",
    "auroc",
    "bald_batch",
    "best_of_k",
    "brier",
    "brier_multiclass",
    "brier_top",
    "classwise_ece",
    "compare",
    "compare_tasks",
    "conformal",
    "conformal_answers",
    "conformal_quantile",
    "coverage_at_risk",
    "coverage_band",
    "disagreement",
    "e_aurc",
    "ece",
    "entailment_clusters",
    "fpr_at_95",
    "maj_at_k",
    "maj_at_k_judged",
    "mce",
    "mutual_information",
    "nll",
    "null_band",
    "p_true",
    "pass_at_k",
    "pass_at_k_of_item",
    "pass_hat_k",
    "pass_hat_k_of_item",
    "predictive_entropies",
    "predictive_entropy",
    "prr",
    "reliability_diagram",
    "risk_at_coverage",
    "risk_coverage",
    "roc_curve",
    "semantic_entropies",
    "semantic_entropy",
    "tace",
    "vote_fraction",
]
