"""The matrix [N rationales, A answers] of log p(y_a | x, z_n) that the mixture rankers read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..engines.base import Engine, Law, ScoreRequest
from ..engines.rollout import REASONER, Prompts, answer_context
from ..store import SampleRecord
from ..types import Problem
from .candidates import Array


def score_matrix(
    engine: Engine,
    builder: Prompts,
    problem: Problem,
    records: Sequence[SampleRecord],
    law: Law = REASONER,
    progress: str | None = None,
) -> Array:
    """log p(y_a | x, z_n) in nats for every stored rationale and every distinct answer string, in the order
    of `candidates_from_records`. The ids kept from sampling are scored, never re-tokenised text; an
    incomplete rationale gets a row of -inf. N * A scores: an answer is short, and the engine shares the
    prefix."""
    answers: dict[str, tuple[int, ...]] = {}
    for record in records:
        if record.answered:
            answers.setdefault(record.answer_text, record.answer_ids)
    matrix = np.full((len(records), len(answers)), -math.inf)
    traces: dict[tuple[int, ...], list[int]] = {}
    for n, record in enumerate(records):
        if record.complete:
            traces.setdefault(record.trace_ids, []).append(n)
    requests = [
        ScoreRequest(answer_context(builder, problem, trace), ids, law)
        for trace in traces
        for ids in answers.values()
    ]
    scored = iter(engine.score(requests, progress=progress) if requests else [])
    for rows in traces.values():
        matrix[rows] = [math.fsum(next(scored)) for _ in answers]
    return matrix
