"""A suite from its config to its result file.

    result = run_suite(config, requirements=[Requirement.parse("accuracy>=0.6")])

Writes OUTPUT_DIR/config.yaml, the stores OUTPUT_DIR/<task>/samples, and OUTPUT_DIR/result.json last.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..config import save_resolved, to_dict
from ..ranking import Candidates
from ..stats import empty
from ..store import SampleRecord
from .audit import ITEMS, TOLERANCE, Audit, audit_of, choose, differences
from .beliefs import Belief, beliefs, needs_model, score_member
from .comparing import problem_hash
from .measuring import Measured, measure, row_names
from .members import Members, load_members
from .provenance import engine_name
from .requirements import Requirement
from .result import header, row
from .running import Filled, fill, hash_problems, prepare
from .suite import SuiteConfig

RESULT = "result.json"


def run_suite(
    config: SuiteConfig,
    requirements: Sequence[Requirement] = (),
    audit: bool = False,
    tolerance: float | None = None,
    members: Members | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Draw what is missing, measure, and write the result, which is also returned.

    members: the models, those of the config by default. tolerance: of the audit, nats; by dtype if None. UserError for
    anything wrong with the config, a requirement that names nothing, or a prompt that does not fit, before a sample is
    drawn.
    """
    clock = [time.perf_counter()]
    count = len(members) if members is not None else config.models
    names = {task: _names(config, task, count) for task in config.tasks}
    for requirement in requirements:
        requirement.check_names(names)
    if members is None:
        members = load_members(config.model, config.dtype, config.members, config.engine)
    with members.serve(next(iter(members))) as engine:
        context, sampler = getattr(engine, "context", None), engine_name(engine)
    tasks = prepare(config, members, context)
    output = Path(config.output_dir)
    save_resolved(config, output)
    filled = fill(config, members, tasks, progress)
    clock.append(time.perf_counter())
    measured = {f.task.name: _measure(config, members, f, progress) for f in filled}
    clock.append(time.perf_counter())
    rows = {
        task: {name: m.rows.get(name, empty("nothing drawn")) for name in names[task]}
        for task, m in measured.items()
    }
    if tolerance is None:
        tolerance = TOLERANCE.get(config.dtype, TOLERANCE["bfloat16"])
    audited = _audit(members, filled, tolerance).to_json() if audit else None
    result = {
        **header(config.suite, to_dict(config)),
        "model": {**_models(config, members), "engine": sampler},
        "tasks": {f.task.name: _task_report(f, measured[f.task.name]) for f in filled},
        "rows": [row(task, name, value) for task, own in rows.items() for name, value in own.items()],
        "cost": _cost(filled, clock),
        "requirements": [o.to_json() for requirement in requirements for o in requirement.judge(rows)],
        "audit": audited,
        "items": {f.task.name: _items(f, measured[f.task.name]) for f in filled},
    }
    result = _plain(result)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(output / RESULT, text + "\n")
    return {"file": str(output / RESULT), **result}


def _names(config: SuiteConfig, task: str, members: int) -> tuple[str, ...]:
    settings = config.sampling_of(task)
    return row_names(settings.traces, settings.answers, members)


def _models(config: SuiteConfig, members: Members) -> dict[str, Any]:
    listed = [{"index": m.index, "name": m.name, "weights": m.weights} for m in members]
    return {"name": config.model, "weights": members.base, "members": listed}


def _cost(filled: Sequence[Filled], clock: Sequence[float]) -> dict[str, float]:
    """clock: when the run started, had drawn, had measured."""
    return {
        "tokens": sum(f.tokens for f in filled),
        "tokens_drawn_now": sum(f.tokens_new for f in filled),
        "seconds": time.perf_counter() - clock[0],
        "seconds_drawing": sum(f.seconds for f in filled),
        "seconds_ranking": clock[2] - clock[1],
    }


def _measure(config: SuiteConfig, members: Members, filled: Filled, progress: bool) -> Measured:
    task, records = filled.task, filled.records
    several = task.settings.traces * task.settings.answers * len(members) > 1
    believed: dict[str, Belief] | None = None
    if several:
        scored: dict[tuple[int | None, str], Candidates] | None = None
        if needs_model(records, config.rank):
            scored = {}
            for member in members:
                own = [r for r in records if r.member == member.index]
                label = f"{task.name}: {config.rank}" if progress else None
                with members.serve(member) as engine:
                    scored |= score_member(engine, task.builder.cue_ids, own, member.adapter, label)
        believed = beliefs(records, config.rank, scored)
    begun = set(filled.asked)
    return measure(records, believed, [i for i in task.too_long if i in begun], len(members))


def _items(filled: Filled, measured: Measured) -> dict[str, Any]:
    hashes = {p.id: problem_hash(p.question, p.answer) for p in filled.task.problems}
    return {i: {"problem": hashes[i], **item} for i, item in measured.items.items()}


def _task_report(filled: Filled, measured: Measured) -> dict[str, Any]:
    begun = set(filled.asked)
    return {
        "problems": len(measured.items),
        "samples": len(filled.records),
        "left_out": filled.left_out,
        "left_out_why": filled.why,
        "repeated": filled.task.repeated,
        "too_long": [i for i in filled.task.too_long if i in begun],
        "verifier_failures": measured.verifier_failures,
        "data": hash_problems([p for p in filled.task.problems if p.id in begun]),
        "prompts": filled.task.prompts,
        "store": str(filled.store),
        "new": filled.new,
        "tokens": filled.tokens,
    }


def _audit(members: Members, filled: Sequence[Filled], tolerance: float) -> Audit:
    """ITEMS stored samples over all tasks and members."""
    of: dict[str, tuple[SampleRecord, Filled]] = {r.key: (r, f) for f in filled for r in f.records}
    chosen = choose([record for record, _ in of.values()], ITEMS)
    found: list[tuple[str, list[float]]] = []
    for member in members:
        own = [r for r in chosen if r.member == member.index]
        if not own:
            continue
        with members.serve(member) as engine:
            for record in own:
                cue = of[record.key][1].task.builder.cue_ids
                found.append((record.key, differences(engine, cue, record, member.adapter)))
    return audit_of(found, tolerance)


def _plain(value: Any) -> Any:
    """As JSON knows it: a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
