"""What a ranker needs a model for: log p(y_a | x, z_n) of every answer behind every rationale, and log p(z_n | x).

All requests of all problems go to the engine in one call. They are paths of one prefix tree a problem (x once, z_n
behind x, the answers behind each z_n), which the tree scorer runs in x + N z + N A y tokens where pair by pair takes
N A (x + z + y). The ids kept from sampling are scored, never re-tokenised text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..engines.base import Engine, Law, ScoreRequest
from ..engines.rollout import REASONER
from ..errors import UserError
from ..store import SampleRecord
from .candidates import Array, Candidates, candidates_from_records


def score_candidates(
    engine: Engine,
    cue_ids: Sequence[int],
    groups: Mapping[str, Sequence[SampleRecord]],
    law: Law = REASONER,
    progress: str | None = None,
    traces: bool | None = None,
) -> dict[str, Candidates]:
    """The candidates of each problem with `logp_answer`, `logp_own` and `logp_trace` under `law`, the model that ranks.

    traces: score log p(z | x) too; by default where the samples do not hold it (drawn at another temperature). Say
    True where other weights than those of `law` drew them. UserError for samples without token ids.
    """
    made = {name: candidates_from_records(records) for name, records in groups.items()}
    plans = {name: _Plan(records, cue_ids, law) for name, records in groups.items()}
    wanted = {
        name: c.logp_trace is None if traces is None else traces for name, c in made.items()
    }  # whose traces
    requests = [r for name, plan in plans.items() for r in plan.requests(wanted[name])]
    scored = iter(engine.score(requests, progress=progress) if requests else [])
    for name, plan in plans.items():
        totals = [math.fsum(next(scored)) for _ in plan.requests(wanted[name])]
        matrix, trace = plan.arrays(totals, wanted[name])
        chosen = np.array(made[name].chosen)
        own = (
            np.where(chosen >= 0, matrix[np.arange(len(chosen)), chosen], -np.inf)
            if plan.answers
            else np.full(len(chosen), -np.inf)
        )
        made[name] = dataclasses.replace(
            made[name],
            logp_answer=matrix,
            logp_own=own,
            logp_trace=made[name].logp_trace if trace is None else trace,
        )
    return made


def score_matrices(
    engine: Engine,
    cue_ids: Sequence[int],
    groups: Mapping[str, Sequence[SampleRecord]],
    law: Law = REASONER,
    progress: str | None = None,
) -> dict[str, Array]:
    """Of each problem log p(y_a | x, z_n) in nats, [N, A] in the order of `candidates_from_records`; a row of -inf for
    an incomplete rationale."""
    scored = score_candidates(engine, cue_ids, groups, law, progress, traces=False)
    return {name: c.need("logp_answer", "scoring") for name, c in scored.items()}


class _Plan:
    """What is asked of the engine for one problem: equal rationales once, each distinct answer text once."""

    def __init__(self, records: Sequence[SampleRecord], cue_ids: Sequence[int], law: Law) -> None:
        self.rows, self.law, self.cue = len(records), law, tuple(cue_ids)
        answers: dict[str, tuple[int, ...]] = {}
        self.same: dict[tuple[tuple[int, ...], tuple[int, ...], bool], list[int]] = {}
        for n, record in enumerate(records):
            if not record.trace_ids:
                raise UserError(
                    f"sample {record.key} of problem {record.problem_id!r} is stored as text, without token ids to "
                    "score: rank by a method that needs no model (majority)"
                )
            if record.answered:
                answers.setdefault(record.answer_text, record.answer_ids)
            self.same.setdefault((record.prompt_ids, record.trace_ids, record.complete), []).append(n)
        self.answers = list(answers.values())

    def requests(self, traces: bool) -> list[ScoreRequest]:
        """Per distinct rationale: itself if asked for, then every answer behind it if it is complete."""
        found = []
        for prompt, trace, complete in self.same:
            if traces:
                found.append(ScoreRequest(prompt, trace, self.law))
            if complete:
                context = (*prompt, *trace, *self.cue)
                found += [ScoreRequest(context, ids, self.law) for ids in self.answers]
        return found

    def arrays(self, totals: Sequence[float], traces: bool) -> tuple[Array, Array | None]:
        """The totals of `requests`, as [N, A] and [N]."""
        matrix = np.full((self.rows, len(self.answers)), -math.inf)
        trace = np.empty(self.rows)
        scored = iter(totals)
        for (_, _, complete), rows in self.same.items():
            if traces:
                trace[rows] = next(scored)
            if complete:
                matrix[rows] = [next(scored) for _ in self.answers]
        return matrix, trace if traces else None
