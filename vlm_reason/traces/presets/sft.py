"""Supervised fine-tuning on given traces: the teacher's trace and the reference answer, weight 1.

    maximise  log pi(z_teacher | x) + log pi(y* | x, z_teacher)

No latent variable is inferred: the baseline that every other preset has to beat. `trace=False` trains the
answer alone behind an empty trace (the no-trace control). Do not use it to learn from a model's own samples:
that is `rft`.
"""

from __future__ import annotations

from ...types import Coefficients, Scores
from ..recipe import DATASET, EMPTY, Evidence, Phase, Recipe, State


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    one = scores.mask.to(scores.log_evidence.dtype)
    return Coefficients(c_z=one, c_y=one.unsqueeze(-1)), state


def weigh_answer(scores: Scores, state: State) -> tuple[Coefficients, State]:
    return Coefficients(c_y=scores.mask.to(scores.log_evidence.dtype).unsqueeze(-1)), state


def recipe(trace: bool = True) -> Recipe:
    phase = Phase(
        name="sft",
        weigh=weigh if trace else weigh_answer,
        proposal=DATASET if trace else EMPTY,
        evidence=Evidence("one"),
        targets="gold",
    )
    return Recipe(
        "sft", (phase,), traces=1, source="-", optimises="log-likelihood of the given traces and answers"
    )
