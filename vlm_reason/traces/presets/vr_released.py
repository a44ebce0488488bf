"""Variational Reasoning as its released pipeline computes it: one offline pass, best of K, mixed with the data.

    phase 1  q: plain fine-tuning of the hinted model on the given traces (c_q = 1)
    phase 2  pi: the given trace and answer (c = 1)
    phase 3  pi: of K = 8 traces from q, the one with the largest  log e + mean_t [log pi - log q]  (c = 1),
             if any is right

Kept for comparison: it is best-of-K distillation, not the weighted bound of the paper's Algorithm 1 (see
`vr`), and it needs teacher traces. The answer trained behind the chosen trace is the first right one. arXiv
2509.22637, section 4.1.
"""

from __future__ import annotations

from typing import Literal

from ...objectives import ratio_named
from ...objectives.normalisers import Argmax
from ...types import Coefficients, Scores
from ..recipe import DATASET, POSTERIOR, Evidence, Phase, Recipe, State
from ..weighing import log_ratio, no_signal
from .sft import weigh as weigh_given


def weigh_teacher(scores: Scores, state: State) -> tuple[Coefficients, State]:
    return Coefficients(c_q=scores.mask.to(scores.log_evidence.dtype)), state


def weigh_best(scores: Scores, state: State) -> tuple[Coefficients, State]:
    stable = ratio_named("per_token")(log_ratio(scores), scores.log_evidence, scores.length, scores.mask)
    c = Argmax()(scores.log_evidence + stable, scores.mask)
    right = scores.answer_weight > 0
    first = right & (right.long().cumsum(-1) == 1)
    return Coefficients(c_z=c, c_y=c.unsqueeze(-1) * first, null=no_signal(c)), state


def recipe(evidence: Literal["accuracy", "mean_logp"] = "accuracy", samples: int = 8) -> Recipe:
    e = Evidence(evidence, samples=samples if evidence == "accuracy" else 1)
    given = Evidence("one")
    phases = (
        Phase(
            "teacher", weigh_teacher, trains=("posterior",), proposal=DATASET, evidence=given, targets="none"
        ),
        Phase("original", weigh_given, proposal=DATASET, evidence=given, targets="gold"),
        Phase(
            "selected",
            weigh_best,
            proposal=POSTERIOR,
            evidence=e,
            targets="sampled" if e.samples_answers else "gold",
            needs=frozenset({"logp_prior", "logq"}),
        ),
    )
    return Recipe(
        "vr_released", phases, traces=8, source="arXiv 2509.22637", optimises="best-of-K distillation"
    )
