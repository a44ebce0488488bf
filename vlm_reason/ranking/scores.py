"""The matrix [N rationales, A answers] of log p(y_a | x, z_n) that the mixture rankers read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..engines.base import Engine, Law, ScoreRequest
from ..engines.rollout import REASONER
from ..store import SampleRecord
from .candidates import Array


def score_matrices(
    engine: Engine,
    cue_ids: Sequence[int],
    groups: Mapping[str, Sequence[SampleRecord]],
    law: Law = REASONER,
    progress: str | None = None,
) -> dict[str, Array]:
    """For the records of each problem, log p(y_a | x, z_n) in nats, [N, A] in the order of
    `candidates_from_records`.

    The ids kept from sampling are scored behind prompt + trace + cue, never re-tokenised text; an incomplete
    rationale gets a row of -inf. N * A short scores a problem, equal rationales once, all in one call so that
    the engine can share prefixes and fill its batches.
    """
    plans = {name: _plan(records) for name, records in groups.items()}
    requests = [
        ScoreRequest((*records[rows[0]].prompt_ids, *records[rows[0]].trace_ids, *cue_ids), ids, law)
        for name, records in groups.items()
        for rows in plans[name][0]
        for ids in plans[name][1]
    ]
    scored = iter(engine.score(requests, progress=progress) if requests else [])
    matrices = {}
    for name, records in groups.items():
        same, answers = plans[name]
        matrix = np.full((len(records), len(answers)), -math.inf)
        for rows in same:
            matrix[rows] = [math.fsum(next(scored)) for _ in answers]
        matrices[name] = matrix
    return matrices


def _plan(records: Sequence[SampleRecord]) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Rows that share prompt and complete rationale, and the ids of each distinct answer text."""
    answers: dict[str, tuple[int, ...]] = {}
    same: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for n, record in enumerate(records):
        if record.answered:
            answers.setdefault(record.answer_text, record.answer_ids)
        if record.complete:
            same.setdefault((record.prompt_ids, record.trace_ids), []).append(n)
    return list(same.values()), list(answers.values())
