"""Fill a sample store: draw what is not there yet, a few problems at a time, each chunk on disk before the
next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..engines.base import Engine
from ..engines.rollout import Prompts
from ..engines.seeds import counter_seed
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
    for chunk in chunks(problems, config):
        done += len(chunk)
        label = progress and f"{progress} {done}/{len(problems)}"
        if not all(is_stored(store, builder, p, config, provenance) for p in chunk):
            new += store.append(draw(engine, builder, chunk, judge, config, provenance, label))
    return new


def chunks(problems: Sequence[Problem], config: EvalConfig) -> Iterator[Sequence[Problem]]:
    """`problems` in pieces of SAMPLES_PER_CHUNK samples, cut at the same places whatever is stored already. What is
    missing of a piece is drawn with the whole of it: rounding depends on the company in a batch, so a run that was
    killed gives the same bits as one that was not."""
    size = max(1, SAMPLES_PER_CHUNK // (config.traces * config.answers))
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def is_stored(
    store: SampleStore, builder: Prompts, problem: Problem, config: EvalConfig, provenance: Provenance
) -> bool:
    """Is every trace of `problem` there, with all its answers or without any because it was cut?"""
    keys = record_keys(builder, problem, config, provenance)

    def has(k: int, m: int) -> bool:
        return store.has(keys[k, m])

    return all(
        has(k, 0) or all(has(k, m) for m in range(1, config.answers + 1)) for k in range(config.traces)
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
