"""Two or more evaluations side by side, problem by problem: result files of suites, or stores of samples.

Problems are joined on their ids, and an id must mean the same question and answer everywhere. Other sets of problems
are refused, or with `common` cut to what all have, which is then said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from ..store import SampleRecord, SampleStore
from .beliefs import beliefs, by_problem
from .harness import are_members, models_of, summarise
from .metrics import Comparison, compare_tasks
from .result import read_result

Metric = Literal["accuracy", "answer_accuracy"]
_FIELD: Mapping[str, str] = {"accuracy": "correct", "answer_accuracy": "right"}


@dataclass(frozen=True)
class Outcomes:
    """One system: tasks -> problem -> value in [0, 1]; and what the problem was, as `problem_hash` gives it."""

    name: str
    values: Mapping[str, Mapping[str, float]]
    problems: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Compared:
    """differences: (task, other system) -> other minus first. means: task -> mean of each system, in order. left_out:
    what was not compared, a line each."""

    names: tuple[str, ...]
    differences: Mapping[tuple[str, str], Comparison]
    means: Mapping[str, tuple[float, ...]]
    left_out: tuple[str, ...] = field(default=())


def problem_hash(question: str, reference: str) -> str:
    """8 hex digits of what a problem asks and what is right."""
    return hashlib.blake2b(json.dumps([question, reference]).encode(), digest_size=4).hexdigest()


def read_outcomes(source: str, metric: Metric = "accuracy", method: str = "majority") -> Outcomes:
    """From a result file, a folder that holds result.json, or a store of samples. `STORE#base` and `STORE#trained` take
    one system of a store that `vlm-reason sample` filled with both. method: of ranking, for the answer_accuracy of a
    store; a result file says how it was ranked."""
    path_text, _, system = source.partition("#")
    path = Path(path_text)
    if path.is_dir() and not (path / "result.json").is_file():
        return _from_store(source, path, system, metric, method)
    if system:
        raise UserError(f"{source!r}: '#{system}' chooses a system of a store, and this is a result file")
    data = read_result(path / "result.json" if path.is_dir() else path)
    name = _FIELD[metric]
    values: dict[str, dict[str, float]] = {}
    for task, items in data["items"].items():
        lacking = next((i for i, item in items.items() if item.get(name) is None), None)
        if lacking is not None:
            raise UserError(
                f"{source!r}: task {task!r} has no {metric} (problem {lacking!r}), because one sample a problem was "
                "drawn: compare by accuracy"
            )
        values[task] = {i: float(item[name]) for i, item in items.items()}
    problems = {
        task: {i: item["problem"] for i, item in items.items()} for task, items in data["items"].items()
    }
    return Outcomes(source, values, problems)


def _from_store(source: str, path: Path, system: str, metric: Metric, method: str) -> Outcomes:
    records = list(SampleStore.open(path).records())
    if system:
        proposals = {"base": "base/prior", "trained": "reasoner/prior"}
        if system not in proposals:
            raise UserError(f"{source!r}: the system of a store is base or trained, got {system!r}")
        records = [r for r in records if r.proposal == proposals[system]]
        if not records:
            raise UserError(f"no samples of the {system} model in {str(path)!r}")
    _check_one_system(source, records)
    if metric == "accuracy":
        values = dict(summarise(records, members=True).per_problem)
    else:
        values = {p: float(b.right) for p, b in beliefs(records, method).items()}
    problems = {p: problem_hash(own[0].question, own[0].reference) for p, own in by_problem(records).items()}
    return Outcomes(source, {"samples": values}, {"samples": problems})


def _check_one_system(source: str, records: Sequence[SampleRecord]) -> None:
    """A store may hold the members of one posterior, which are one system, but not several models or laws: no two
    posteriors, and no single model beside members."""
    laws = sorted({f"{r.proposal} at temperature {r.temperature:g}, top_p {r.top_p:g}" for r in records})
    models = models_of(records)
    if len(laws) > 1 or (len(models) > 1 and not are_members(models)):
        named = [w if m is None else f"member {m} of {w}" for m, w in models]
        listed = "; ".join(laws if len(laws) > 1 else named)
        raise UserError(
            f"{source!r} holds samples of several systems ({listed}): choose one with #base or #trained, or compare "
            "result files"
        )


def compare_outcomes(systems: Sequence[Outcomes], common: bool = False) -> Compared:
    """Every system against the first, on every task, p-values adjusted by Holm over all of these comparisons. UserError
    for tasks or problems that not all of them have, unless `common`, and for an id that stands for two problems."""
    if len(systems) < 2:
        raise UserError("compare takes two or more results")
    if len({s.name for s in systems}) < len(systems):
        raise UserError("compare was given the same result twice")
    systems = _one_task_name(systems)
    said: list[str] = []
    tasks = _shared_tasks(systems, common, said)
    ids = {task: _shared_ids(task, systems, common, said) for task in tasks}
    for task in tasks:
        _same_problems(task, ids[task], systems)
    first, *others = systems
    pairs = {}
    for other in others:
        for task in tasks:
            order = sorted(ids[task])
            mine = np.array([other.values[task][i] for i in order])
            base = np.array([first.values[task][i] for i in order])
            pairs[json.dumps([task, other.name])] = (mine, base, order, order)
    compared = compare_tasks(pairs)
    differences = {_pair(key): value for key, value in compared.items()}
    means = {t: tuple(float(np.mean([s.values[t][i] for i in ids[t]])) for s in systems) for t in tasks}
    return Compared(tuple(s.name for s in systems), differences, means, tuple(said))


def _pair(key: str) -> tuple[str, str]:
    task, name = json.loads(key)
    return task, name


def _one_task_name(systems: Sequence[Outcomes]) -> Sequence[Outcomes]:
    """A store does not know what its task is called: where every system has a single one, it is the same one."""
    if any(len(s.values) != 1 for s in systems):
        return systems
    names = [next(iter(s.values)) for s in systems]
    name = next((n for n in names if n != "samples"), "samples")
    if len({n for n in names if n != "samples"}) > 1:
        return systems
    return [Outcomes(s.name, {name: _only(s.values)}, {name: _only(s.problems)}) for s in systems]


def _only(mapping: Mapping[str, Any]) -> Any:
    (value,) = mapping.values()
    return value


def _shared_tasks(systems: Sequence[Outcomes], common: bool, said: list[str]) -> list[str]:
    everywhere = [t for t in systems[0].values if all(t in s.values for s in systems)]
    some = sorted({t for s in systems for t in s.values} - set(everywhere))
    if some and not common:
        lacking = next(s.name for s in systems if some[0] not in s.values)
        raise UserError(
            f"task {some[0]!r} is not in {lacking!r}: compare results of the same tasks, or say --common to compare "
            f"only those that all have ({', '.join(everywhere) or 'none'})"
        )
    if not everywhere:
        raise UserError("the results have no task in common")
    said += [f"task {task} is not in every result" for task in some]
    return everywhere


def _shared_ids(task: str, systems: Sequence[Outcomes], common: bool, said: list[str]) -> set[str]:
    sets = [set(s.values[task]) for s in systems]
    shared = set.intersection(*sets)
    for s, own in zip(systems, sets, strict=True):
        extra = own - shared
        if not extra:
            continue
        if not common:
            others = ", ".join(f"{len(o)} in {n.name!r}" for n, o in zip(systems, sets, strict=True))
            raise UserError(
                f"task {task!r}: not the same problems ({others}; {len(shared)} in all of them, {min(extra)!r} is only "
                f"in some): a difference would not be of the systems. Say --common to compare the {len(shared)} "
                "shared ones"
            )
        said.append(f"task {task}: {len(extra)} of {len(own)} problems of {s.name} are not in every result")
    if not shared:
        raise UserError(f"task {task!r}: the results have no problem in common")
    return shared


def _same_problems(task: str, ids: set[str], systems: Sequence[Outcomes]) -> None:
    for other in systems[1:]:
        for i in sorted(ids):
            if other.problems[task][i] != systems[0].problems[task][i]:
                raise UserError(
                    f"task {task!r}: {i!r} is one problem in {systems[0].name!r} and another in {other.name!r} (its "
                    "question or its answer differs): compare results over the same data"
                )
