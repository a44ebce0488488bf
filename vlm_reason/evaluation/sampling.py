"""Fill a sample store: draw what is not there yet, a few problems at a time, each chunk on disk before the
next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from ..engines.base import Engine
from ..engines.rollout import Prompts
from ..engines.seeds import counter_seed
from ..errors import UserError
from ..store import Judge, Provenance, SampleRecord, SampleStore
from ..types import Problem
from .harness import EvalConfig, draw, visit_of

SAMPLES_PER_CHUNK = 256


def sample_into(
    store: SampleStore,
    engine: Engine,
    builder: Prompts,
    problems: Sequence[Problem],
    judge: Judge | None,
    config: EvalConfig,
    provenance: Provenance,
    progress: str | None = None,
) -> int:
    """Draw `config.traces` x `config.answers` samples of every problem into the store and return how many
    records are new. A chunk whose samples are all there is not drawn again, so an interrupted call is taken
    up by repeating it, and more traces a problem keep the ones that are there."""
    new = done = 0
    known: dict[str, SampleRecord] | None = None
    for chunk in chunks(problems, config):
        done += len(chunk)
        label = progress and f"{progress} {done}/{len(problems)}"
        if all(is_stored(store, builder, p, config, provenance) for p in chunk):
            continue
        if known is None:
            known = {record.key: record for record in store.records()}
        drawn = draw(engine, builder, chunk, judge, config, provenance, label)
        new += store.append(unstored(drawn, known, builder, chunk, config, provenance))
    return new


def chunks(problems: Sequence[Problem], config: EvalConfig) -> Iterator[Sequence[Problem]]:
    """`problems` in pieces of SAMPLES_PER_CHUNK samples, cut at the same places whatever is stored already. What is
    missing of a piece is drawn with the whole of it: rounding depends on the company in a batch, so a run that was
    killed gives the same bits as one that was not."""
    size = max(1, SAMPLES_PER_CHUNK // (config.traces * config.answers))
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def unstored(
    drawn: Sequence[SampleRecord],
    known: Mapping[str, SampleRecord],
    builder: Prompts,
    problems: Sequence[Problem],
    config: EvalConfig,
    provenance: Provenance,
) -> list[SampleRecord]:
    """What of a chunk that was drawn again goes into the store, which holds `known` (key -> record). Rounding depends
    on the company in a batch, so a trace may come out another one than the stored: a trace that is there whole stays
    as it is, and one that has some of its answers gets the others only where it is the same trace."""
    keys = {p.id: record_keys(builder, p, config, provenance) for p in problems}
    kept = []
    for record in drawn:
        own = {m: keys[record.problem_id][record.k, m] for m in range(config.answers + 1)}
        there = {m: known[key] for m, key in own.items() if key in known}
        same = all(r.trace_ids == record.trace_ids for r in there.values())
        if same and record.m not in there and not _is_whole(there, config.answers):
            kept.append(record)
    return kept


def _is_whole(there: Collection[int], answers: int) -> bool:
    """Does a trace with the records m in `there` have all its answers, or none because it was cut?"""
    return 0 in there or all(m in there for m in range(1, answers + 1))


def is_stored(
    store: SampleStore, builder: Prompts, problem: Problem, config: EvalConfig, provenance: Provenance
) -> bool:
    """Is every trace of `problem` there, with all its answers or without any because it was cut?"""
    keys = record_keys(builder, problem, config, provenance)
    return all(
        _is_whole([m for m in range(config.answers + 1) if store.has(keys[k, m])], config.answers)
        for k in range(config.traces)
    )


def check_references(records: Sequence[SampleRecord], problems: Sequence[Problem]) -> None:
    """UserError where a stored sample was judged against another reference answer than the problem now has."""
    answers = {p.id: p.answer for p in problems}
    for record in records:
        if record.reference != answers[record.problem_id]:
            raise UserError(
                f"problem {record.problem_id!r} was judged against the answer {record.reference!r}, and the data now "
                f"say {answers[record.problem_id]!r}: choose another output_dir"
            )


def stored(
    store: SampleStore,
    builder: Prompts,
    problems: Sequence[Problem],
    config: EvalConfig,
    provenance: Provenance,
) -> list[SampleRecord]:
    """The records in the store that `config` asks for, and no others."""
    wanted = {
        key for problem in problems for key in record_keys(builder, problem, config, provenance).values()
    }
    return [record for record in store.records() if record.key in wanted]


def record_keys(
    builder: Prompts, problem: Problem, config: EvalConfig, provenance: Provenance
) -> dict[tuple[int, int], str]:
    """(k, m) -> key of every record that `problem` may have."""
    prompt, visit = builder.prior_ids(problem), visit_of(provenance)
    return {
        (k, m): provenance.key(prompt, counter_seed(config.seed, "eval", 0, problem.id, visit, k, 0), k, m)
        for k in range(config.traces)
        for m in range(config.answers + 1)
    }
