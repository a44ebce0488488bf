"""Every problem with its ranked rationales, and the three ways a problem can end:

    right           the chosen answer is right
    not_chosen      a right answer was sampled, another was chosen: the ranker's fault
    never_sampled   no sample was right: the sampler's fault

Listed worst first: wrong answers by falling confidence, then right ones by rising confidence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ranking import Outcome, candidates_from_records, outcome, rank, rank_members, split_members
from ...store import SampleRecord
from .passages import passages
from .system import Problems
from .text import visible
from .tokens import Decode

MOST_RATIONALES = 32
"""Of one problem in the page."""


@dataclass(frozen=True)
class Place:
    """Problem `i` of `problems`, of system number `system` and task number `task`: the answer that was chosen
    (None: nothing could be read), how sure the choice is, and how it ended."""

    problems: Problems
    i: int
    system: int
    task: int
    chosen: str | None
    confidence: float
    kind: Outcome


@dataclass(frozen=True)
class Ranked:
    """A rationale with its posterior r (over all members' samples, sums to 1)."""

    record: SampleRecord
    posterior: float


def places(tasks: Sequence[Mapping[int, Problems]], method: str) -> list[Place]:
    """All problems of all systems, worst first. tasks[t][s]: the problems of system s on task t."""
    found = [
        _place(problems, i, system, task, method)
        for task, by_system in enumerate(tasks)
        for system, problems in by_system.items()
        for i in range(len(problems))
    ]
    return sorted(found, key=_worst_first)


def _worst_first(place: Place) -> tuple[bool, float]:
    sure = 0.0 if math.isnan(place.confidence) else place.confidence
    return (True, sure) if place.kind == "right" else (False, -sure)


def _place(problems: Problems, i: int, system: int, task: int, method: str) -> Place:
    """The vote is known from the columns; another method has to rank the samples."""
    if method == "majority":
        missed: Outcome = "not_chosen" if problems.sampled[i] else "never_sampled"
        kind: Outcome = "right" if problems.right[i] else missed
        sure = float(problems.confidence[i]) if problems.sure else math.nan
        return Place(problems, i, system, task, problems.chosen[i], sure, kind)
    records = _records(problems, i)
    members = [candidates_from_records(own) for own in split_members(records).values()]
    ranking = rank_members(members, method)
    confidence = ranking.posterior[0] if ranking.posterior else 0.0
    return Place(problems, i, system, task, ranking.answer, confidence, outcome(records, ranking.answer))


def _records(problems: Problems, i: int) -> list[SampleRecord]:
    start = problems.items.start
    return [problems.columns.record(row) for row in range(int(start[i]), int(start[i + 1]))]


def ranked(place: Place, method: str) -> list[Ranked]:
    """The rationales of a problem, best first. Members are ranked apart, on their own samples, and weigh the same."""
    groups = split_members(_records(place.problems, place.i))
    found = []
    for group in groups.values():
        ranking = rank(candidates_from_records(group), method)
        pairs = zip(ranking.rationales, ranking.rationale_posterior, strict=True)
        found += [Ranked(group[n], posterior / len(groups)) for n, posterior in pairs]
    return sorted(found, key=lambda r: (-round(r.posterior, 12), -_preference(r.record)))


def _preference(record: SampleRecord) -> float:
    """Among equals: the higher reward, else the higher mean log-probability."""
    if record.reward is not None:
        return record.reward
    tokens = len(record.trace_ids) + len(record.answer_ids)
    return (math.fsum(record.trace_logps) + math.fsum(record.answer_logps)) / tokens if tokens else -math.inf


def item(place: Place, method: str, decode: Decode | None) -> dict[str, Any]:
    """What the page shows of a problem. Every text is already `visible`."""
    problems, i = place.problems, place.i
    rationales = ranked(place, method)
    first = rationales[0].record
    return {
        **_facts(place),
        "id": visible(problems.ids[i]),
        "question": visible(first.question),
        "reference": visible(first.reference),
        "chosen": _visible(place.chosen),
        "cut": max(0, len(rationales) - MOST_RATIONALES),
        "members": _members(problems, i),
        "rationales": [_rationale(n, r, decode) for n, r in enumerate(rationales[:MOST_RATIONALES], start=1)],
    }


def _facts(place: Place) -> dict[str, Any]:
    return {
        "system": place.system,
        "task": place.task,
        "kind": place.kind,
        "confidence": None if math.isnan(place.confidence) else round(place.confidence, 6),
    }


def _rationale(rank: int, ranked: Ranked, decode: Decode | None) -> dict[str, Any]:
    record = ranked.record
    shown, cut = passages(record, decode)
    return {**_numbers(rank, ranked), "answer": _visible(record.canonical), "parts": shown, "cut": cut}


def _numbers(rank: int, ranked: Ranked) -> dict[str, Any]:
    record = ranked.record
    known = not record.text_only
    return {
        "rank": rank,
        "posterior": round(ranked.posterior, 6),
        "correct": bool(record.correct),
        "finish": record.finish if record.answer_finish is None else record.answer_finish,
        "logp_trace": round(math.fsum(record.trace_logps), 3) if known else None,
        "logp_answer": round(math.fsum(record.answer_logps), 3) if known and record.answered else None,
        "tokens": len(record.trace_ids) + len(record.answer_ids) if known else None,
        "reward": record.reward,
        "member": record.member,
    }


def _members(problems: Problems, i: int) -> dict[str, Any] | None:
    """Share of each member's samples that gave each answer, the most frequent answers first."""
    if len(problems.members) < 2:
        return None
    answers = problems.answers[i]
    member = problems.columns.member[problems.items.start[i] : problems.items.start[i + 1]]
    codes, counts = np.unique(answers[answers >= 0], return_counts=True)
    top = codes[np.argsort(-counts, kind="stable")][:8]
    rows = []
    for m in problems.members:
        own = answers[member == m]
        rows.append([int(m), [float((own == c).mean()) if len(own) else 0.0 for c in top]])
    return {"answers": [visible(problems.columns.answers[int(c)]) for c in top], "rows": rows}


def line(place: Place, method: str, system: str, task: str) -> str:
    """The same problem whole, as one line of JSON: the text as it was stored, nothing cut."""
    rationales = ranked(place, method)
    first = rationales[0].record
    data = {
        "id": place.problems.ids[place.i],
        **_facts(place),
        "system": system,
        "task": task,
        "question": first.question,
        "reference": first.reference,
        "chosen": place.chosen,
        "rationales": [
            {
                **_numbers(n, r),
                "answer": r.record.canonical,
                "trace": r.record.trace_text,
                "answer_text": r.record.answer_text,
            }
            for n, r in enumerate(rationales, start=1)
        ],
    }
    return json.dumps(data, ensure_ascii=True, allow_nan=False)


def whole(shown: Mapping[str, Any]) -> bool:
    """Does the page hold all of this problem?"""
    return not shown["cut"] and not any(r["cut"] for r in shown["rationales"])


def columns_shown(items: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Which columns of the rationale table anything is known of."""
    every = list(_every(items))
    names = ("logp_trace", "logp_answer", "tokens", "reward", "member")
    return {name: any(r[name] is not None for r in every) for name in names}


def shaded(items: Sequence[Mapping[str, Any]]) -> bool:
    return any(part[1] for r in _every(items) for part in r["parts"])


def _every(items: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (r for shown in items for r in shown["rationales"])


def _visible(text: str | None) -> str | None:
    return None if text is None else visible(text)
