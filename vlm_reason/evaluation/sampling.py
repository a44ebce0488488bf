"""Fill a sample store: draw what is not there yet, a few problems at a time, each chunk on disk before the
next."""

from __future__ import annotations

from collections.abc import Sequence

from ..engines.base import Engine
from ..engines.rollout import Prompts
from ..engines.seeds import counter_seed
from ..store import Judge, Provenance, SampleRecord, SampleStore
from ..types import Problem
from .harness import EvalConfig, draw

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
    records are new. A problem whose samples are all there is not drawn again, so an interrupted call is taken
    up by repeating it, and more traces a problem keep the ones that are there."""
    todo = [p for p in problems if not is_stored(store, builder, p, config, provenance)]
    size = max(1, SAMPLES_PER_CHUNK // (config.traces * config.answers))
    new = 0
    for start in range(0, len(todo), size):
        chunk = todo[start : start + size]
        label = progress and f"{progress} {start + len(chunk)}/{len(todo)}"
        new += store.append(draw(engine, builder, chunk, judge, config, provenance, label))
    return new


def is_stored(
    store: SampleStore, builder: Prompts, problem: Problem, config: EvalConfig, provenance: Provenance
) -> bool:
    """Is every trace of `problem` there, with all its answers or without any because it was cut?"""

    def has(k: int, m: int) -> bool:
        return store.has(_key(builder, problem, config, provenance, k, m))

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
        _key(builder, problem, config, provenance, k, m)
        for problem in problems
        for k in range(config.traces)
        for m in range(config.answers + 1)
    }
    return [record for record in store.records() if record.key in wanted]


def _key(
    builder: Prompts, problem: Problem, config: EvalConfig, provenance: Provenance, k: int, m: int
) -> str:
    return provenance.key(
        builder.prior_ids(problem), counter_seed(config.seed, "eval", 0, problem.id, 0, k, 0), k, m
    )
