"""Chain memory: the one trace a problem carries from visit to visit (TRICE's Markov chain, arXiv 2312.02179)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..types import Completion, Trace, TraceGroup

CHAIN = "chain"


class ChainMemory:
    """problem id -> the trace its chain is at, ids and text as they were drawn. Checkpointed with the run."""

    def __init__(self) -> None:
        self._chains: dict[str, Trace] = {}

    def __len__(self) -> int:
        return len(self._chains)

    def store(self, trace: Trace) -> None:
        self._chains[trace.problem_id] = replace(trace, proposal=CHAIN)

    def extend(self, group: TraceGroup) -> TraceGroup:
        """The group with the problem's stored chain in front, if it has one; fresh traces keep their order."""
        stored = self._chains.get(group.problem.id)
        if stored is None:
            return group
        moved = (replace(trace, k=i + 1) for i, trace in enumerate(group.traces))
        return replace(group, traces=(replace(stored, k=0), *moved))

    def to_json(self) -> list[dict[str, Any]]:
        return [trace_to_json(trace) for trace in self._chains.values()]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> ChainMemory:
        memory = cls()
        for row in rows:
            trace = trace_from_json(row)
            memory._chains[trace.problem_id] = trace
        return memory


def completion_to_json(completion: Completion) -> dict[str, Any]:
    return {**vars(completion), "ids": list(completion.ids), "logps": list(completion.logps)}


def completion_from_json(row: dict[str, Any]) -> Completion:
    return Completion(**{**row, "ids": tuple(row["ids"]), "logps": tuple(row["logps"])})


def trace_to_json(trace: Trace) -> dict[str, Any]:
    return {
        **vars(trace),
        "prompt_ids": list(trace.prompt_ids),
        "completion": completion_to_json(trace.completion),
        "answers": [completion_to_json(a) for a in trace.answers],
    }


def trace_from_json(row: dict[str, Any]) -> Trace:
    return Trace(
        **{
            **row,
            "prompt_ids": tuple(row["prompt_ids"]),
            "completion": completion_from_json(row["completion"]),
            "answers": tuple(completion_from_json(a) for a in row["answers"]),
        }
    )
