"""Run a suite: every task, every member, every sample into the store; then measure what is in the stores.

    prepare    problems, prompts and verifiers of all tasks: what is wrong is found before anything is drawn
    fill       chunk by chunk, all members of a chunk before the next, within the budget
    measure    rows of values with intervals (measuring.py)

OUTPUT_DIR/<task>/samples is the store. Killed at any moment and started again, the run has the same stores and the same
result: seeds come from what a sample is, and chunks are cut at the same places.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..config import load_config
from ..errors import UserError, nearest
from ..ranking import METHODS
from ..store import Judge, SampleRecord, SampleStore
from ..tasks.prompts import PromptBuilder
from ..tasks.sources import held_out, load_problems
from ..types import Problem
from .harness import EvalConfig, draw
from .judging import make_judge
from .members import Member, Members
from .provenance import provenance_of
from .sampling import SAMPLES_PER_CHUNK, check_references, is_stored, record_keys, unstored
from .suite import SuiteConfig

LARGE = 16
"""Chunks are this many times larger where the engine wants thousands of requests at once (vLLM), and where a change of
member loads a model."""

VERIFIER = "verifier.txt"
"""Beside the store of a task: which verifier judged it."""


@dataclass(frozen=True)
class PreparedTask:
    """A task ready to draw. too_long: ids of problems whose prompt leaves no room, which are never drawn. left_out:
    problems over budget.problems. prompts: fingerprint of the builder. repeated: questions that a generator
    made again, dropped."""

    name: str
    problems: tuple[Problem, ...]
    too_long: tuple[str, ...]
    left_out: int
    builder: PromptBuilder
    judge: Judge
    settings: EvalConfig
    prompts: str
    repeated: int


@dataclass(frozen=True)
class Filled:
    """What is in the store of a task. records: those asked for, of the problems that every member finished, in order of
    problem, member, k, m. asked: the problems in order, up to the first that could be drawn and was not begun; those
    too long among them count, those behind it do not. left_out: the others, and `why` (None: there are none). new,
    tokens_new: drawn by this call; seconds: spent drawing."""

    task: PreparedTask
    store: Path
    records: tuple[SampleRecord, ...]
    asked: tuple[str, ...]
    left_out: int
    why: str | None
    new: int
    tokens_new: int
    seconds: float

    @property
    def tokens(self) -> int:
        return tokens_of(self.records)


def prepare(config: SuiteConfig, members: Members, context: int | None) -> list[PreparedTask]:
    """All tasks of `config`. UserError for the first thing that is wrong with any of them."""
    check_verifiers(config)
    if config.rank not in METHODS:
        raise UserError(f"rank: unknown ranking method {config.rank!r}{nearest(config.rank, METHODS)}")
    return [_prepare(config, name, members, context) for name in config.tasks]


def _prepare(config: SuiteConfig, name: str, members: Members, context: int | None) -> PreparedTask:
    from ..tasks.resolve import resolve_template
    from ..traces.run import resolve_verifier

    entry, settings, spec = config.tasks[name], config.sampling_of(name), config.problems_of(name)
    loaded = load_problems(spec)
    # a generator repeats small questions, and two copies are not two items; a data set is taken as it is
    problems = held_out(loaded, ()) if spec.kind == "reasoning_gym" else loaded
    kept = problems[: config.budget.problems]
    builder = PromptBuilder(members.tokenizer, resolve_template(entry.template), entry.shots)
    needs = {p.id: longest(builder, p, settings) for p in kept}
    too_long = tuple(i for i, n in needs.items() if context is not None and n > context)
    if too_long and config.long_prompts == "refuse":
        raise UserError(
            f"task {name!r}: {len(too_long)} of {len(kept)} problems do not fit the model's context of {context} "
            f"tokens with the longest trace and answer; {too_long[0]!r} may take {needs[too_long[0]]}. Lower shots or "
            "sampling.max_trace_tokens, or say long_prompts: wrong to count them as wrong (prompts are never cut)"
        )
    return PreparedTask(
        name, tuple(kept), too_long, len(problems) - len(kept), builder,
        make_judge(resolve_verifier(entry.verifier, spec), builder), settings,
        builder.fingerprint(), len(loaded) - len(problems),
    )  # fmt: skip


def longest(builder: PromptBuilder, problem: Problem, settings: EvalConfig) -> int:
    """Tokens of `problem` with the longest trace and answer that `settings` allow."""
    prompt = len(builder.prior_ids(problem)) + len(builder.cue_ids)
    return prompt + settings.max_trace_tokens + settings.max_answer_tokens


def fill(
    config: SuiteConfig, members: Members, tasks: Sequence[PreparedTask], progress: bool = False
) -> list[Filled]:
    """Draw what is missing of every task, within the budget."""
    tokens, started, filled = 0, time.perf_counter(), []
    for i, task in enumerate(tasks):
        left = len(tasks) - i
        limit = _Limit(
            None if config.budget.tokens is None else (config.budget.tokens - tokens) // left,
            None
            if config.budget.seconds is None
            else (config.budget.seconds - (time.perf_counter() - started)) / left,
        )
        filled.append(_fill(config, members, task, limit, progress))
        tokens += filled[-1].tokens
    return filled


class _Limit:
    """Tokens and seconds that one task may still use."""

    def __init__(self, tokens: int | None, seconds: float | None) -> None:
        self.tokens, self.seconds, self.started = tokens, seconds, time.perf_counter()

    def problems(self, most: int, spent: int, worst: int) -> tuple[int, str | None]:
        """How many of the next `most` problems may be begun, each `worst` tokens at most; if none, why."""
        if self.seconds is not None and time.perf_counter() - self.started >= self.seconds:
            return 0, "seconds"
        if self.tokens is None:
            return most, None
        room = min(most, max(0, self.tokens - spent) // worst)
        return room, None if room else "tokens"


def _fill(config: SuiteConfig, members: Members, task: PreparedTask, limit: _Limit, progress: bool) -> Filled:
    """Chunk after chunk. A budget that ends in a chunk shortens it; where it does so follows from what was drawn
    before, so it is the same place after a restart."""
    folder = Path(config.output_dir) / task.name / "samples"
    skipped = set(task.too_long)
    todo = [p for p in task.problems if p.id not in skipped]
    settings, samples = task.settings, task.settings.traces * task.settings.answers
    large = not members.resident or config.engine.get("kind") == "vllm"
    size = max(1, SAMPLES_PER_CHUNK * (LARGE if large else 1) // samples)
    worst = len(members) * settings.traces
    worst *= settings.max_trace_tokens + settings.answers * settings.max_answer_tokens
    records: list[SampleRecord] = []
    done = new = spent = tokens_new = 0
    why: str | None = None
    started = time.perf_counter()
    with SampleStore(folder) as store:
        known = {record.key: record for record in store.records()}
        while done < len(todo) and why is None:
            count, why = limit.problems(min(size, len(todo) - done), spent, worst)
            chunk = todo[done : done + count]
            label = f"{task.name} {done + count}/{len(todo)}" if progress else None
            if chunk:
                _keep_verifier(folder, config.tasks[task.name].verifier)
            for member in members if chunk else ():
                found, appended, drawn = _chunk(store, known, members, member, task, chunk, label)
                check_references(found, chunk)
                records += found
                spent, new, tokens_new = spent + tokens_of(found), new + appended, tokens_new + drawn
            done += count
    waiting = {p.id for p in todo[done:]}
    asked = [p.id for p in takewhile(lambda p: p.id not in waiting, task.problems)]
    place = {problem: i for i, problem in enumerate(asked)}
    records.sort(key=lambda r: (place[r.problem_id], -1 if r.member is None else r.member, r.k, r.m))
    out, reasons = len(task.problems) - len(asked), [f"budget.{why}"] if why else []
    if task.left_out:
        reasons.append("budget.problems")
    return Filled(
        task, folder, tuple(records), tuple(asked), out + task.left_out, " and ".join(reasons) or None,
        new, tokens_new, time.perf_counter() - started,
    )  # fmt: skip


def _chunk(
    store: SampleStore, known: dict[str, SampleRecord], members: Members, member: Member, task: PreparedTask,
    chunk: Sequence[Problem], label: str | None,
) -> tuple[list[SampleRecord], int, int]:  # fmt: skip
    """The records of one member on one chunk, how many of them are new in the store, and how many tokens were drawn.
    A chunk of which anything is missing is drawn whole (see sampling.chunks); what the store had stays as it was, and
    is what counts."""
    settings = replace(task.settings, adapter=member.adapter)
    appended = tokens = 0
    with members.serve(member) as engine:
        source = provenance_of(engine, task.prompts, settings, member.weights, member.index)
        if not all(is_stored(store, task.builder, p, settings, source) for p in chunk):
            if label and member.index is not None and len(members) > 1:
                label = f"{label}, member {member.index + 1}/{len(members)}"
            drawn = draw(engine, task.builder, chunk, task.judge, settings, source, label)
            fresh = unstored(drawn, known, task.builder, chunk, settings, source)
            appended, tokens = store.append(fresh), tokens_of(drawn)
            known |= {record.key: record for record in fresh}
    keys = (key for p in chunk for key in record_keys(task.builder, p, settings, source).values())
    return [known[key] for key in keys if key in known], appended, tokens


def check_verifiers(config: SuiteConfig) -> None:
    """UserError where the samples in output_dir were judged by another verifier: their verdicts are stored."""
    for name, entry in config.tasks.items():
        then = _judged_by(Path(config.output_dir), name)
        if then not in (None, entry.verifier):
            raise UserError(
                f"the samples of task {name!r} in {config.output_dir!r} were judged by verifier {then!r}, and the "
                f"suite says {entry.verifier!r}: choose another output_dir"
            )


def _judged_by(output: Path, task: str) -> str | None:
    """The verifier of the samples of `task`; None where there are none, or nothing says what it was."""
    if not any((output / task / "samples").glob("segment-*.jsonl")):
        return None
    written, config = output / task / VERIFIER, output / "config.yaml"
    if written.is_file():
        return written.read_text().strip()
    before = load_config(config).get("tasks") or {} if config.is_file() else {}  # of a store without VERIFIER
    return (before.get(task) or {}).get("verifier")


def _keep_verifier(store: Path, verifier: str) -> None:
    """Say beside `store` who judges it, before the first sample is in it. config.yaml cannot: it is of the last run,
    which may have had other tasks."""
    written = store.parent / VERIFIER
    if not written.is_file() or written.read_text().strip() != verifier:
        write_atomically(written, verifier + "\n")


def tokens_of(records: Sequence[SampleRecord]) -> int:
    """Tokens sampled for these records: a trace once, however many answers stand behind it."""
    traces = {(r.problem_id, r.member, r.k, r.seed): len(r.trace_ids) for r in records}
    return sum(traces.values()) + sum(len(r.answer_ids) for r in records)


def hash_problems(problems: Sequence[Problem]) -> str:
    """16 hex digits of what is asked: ids, questions, answers and choices; their order does not matter."""
    digest = hashlib.blake2b(digest_size=8)
    for p in sorted(problems, key=lambda p: p.id):
        content: list[Any] = [p.id, p.question, p.answer, list(p.metadata.get("choices", ()))]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()
